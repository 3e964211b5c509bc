"""Run this model: python3 run.py INPUTS.npy OUTPUTS.npy; what the inputs are is in manifest.json."""

import sys
from pathlib import Path

import numpy as np

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tflite_runtime.interpreter import Interpreter

net = Interpreter(str(Path(__file__).resolve().with_name("model.tflite")), num_threads=1)
net.allocate_tensors()
source, sink, outputs = net.get_input_details()[0], net.get_output_details()[0], []
(scale, zero), (step, centre) = source["quantization"], sink["quantization"]  # scales of int8 models; else 0
for x in np.load(sys.argv[1])[:, None]:
    net.set_tensor(source["index"], np.int8(np.clip(np.round(x / scale) + zero, -128, 127)) if scale else x)
    net.invoke()
    found = net.get_tensor(sink["index"]).astype(np.float32)
    outputs.append((found - centre) * np.float32(step) if step else found)
np.save(sys.argv[2], np.concatenate(outputs))
