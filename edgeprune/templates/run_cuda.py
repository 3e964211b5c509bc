"""Run this model: python3 run.py INPUTS.npy OUTPUTS.npy; what the inputs are is in manifest.json."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

here = Path(__file__).resolve().parent
kind = {"f32": torch.float32, "f16": torch.float16}[json.loads((here / "manifest.json").read_text())["precision"]]
net = torch.jit.freeze(torch.jit.load(str(here / "model.ts"), map_location="cuda").eval().to(kind))
with torch.inference_mode():
    outputs = [net(torch.from_numpy(x[None]).to("cuda", kind)).float().cpu().numpy() for x in np.load(sys.argv[1])]
np.save(sys.argv[2], np.concatenate(outputs))
