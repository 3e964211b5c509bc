"""Run this model: python3 run.py INPUTS.npy OUTPUTS.npy; what the inputs are is in manifest.json."""

import sys
from pathlib import Path

import numpy as np

sys.modules.setdefault("openvino_telemetry", None)  # nothing is reported to anyone
import openvino  # noqa: E402

model = openvino.Core().compile_model(Path(__file__).with_name("model.xml"), "CPU")
outputs = [model(x[None])[0] for x in np.load(sys.argv[1])]
np.save(sys.argv[2], np.concatenate(outputs))
