"""Run this model: python3 run.py INPUTS.npy OUTPUTS.npy; what the inputs are is in manifest.json."""

import sys
from pathlib import Path

import numpy as np

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tflite_runtime.interpreter import Interpreter


def quantised(values, port):
    """Numbers as an input takes them: int8 models have a scale and a zero."""
    scale, zero = port["quantization"]
    return np.clip(np.round(values / scale) + zero, -128, 127).astype(port["dtype"]) if scale else values


def run(net, x):
    source, sink = net.get_input_details()[0], net.get_output_details()[0]
    net.set_tensor(source["index"], quantised(x[None], source))
    net.invoke()
    scale, zero = sink["quantization"]
    found = net.get_tensor(sink["index"]).astype(np.float32)
    return (found - zero) * np.float32(scale) if scale else found


net = Interpreter(str(Path(__file__).resolve().with_name("model.tflite")), num_threads=1)
net.allocate_tensors()
np.save(sys.argv[2], np.concatenate([run(net, x) for x in np.load(sys.argv[1])]))
