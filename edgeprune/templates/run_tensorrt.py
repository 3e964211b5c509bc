"""Run this model: python3 run.py INPUTS.npy OUTPUTS.npy; what the inputs are is in manifest.json.

trtexec builds the engine beside the model at the first run, which takes minutes, and runs it; an application would
load model.plan with TensorRT's own library instead.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

here = Path(__file__).resolve().parent
program = os.environ.get("TRTEXEC") or shutil.which("trtexec") or "/usr/src/tensorrt/bin/trtexec"
engine = here / "model.plan"
help_text = subprocess.run([program, "--help"], stdout=subprocess.PIPE, check=True).stdout.decode()
if not engine.exists():
    flag = {"f16": "--fp16", "int8": "--int8"}.get(json.loads((here / "manifest.json").read_text())["precision"], "")
    typed = ["--stronglyTyped"] if "--stronglyTyped" in help_text else [flag] if flag and flag in help_text else []
    exact = ["--noTF32"] if "--noTF32" in help_text else []
    command = [program, f"--onnx={here / 'model.onnx'}", f"--saveEngine={engine}.part", *typed, *exact]
    subprocess.run(command, stdout=sys.stderr, check=True)
    os.replace(f"{engine}.part", engine)
outputs = []
with tempfile.TemporaryDirectory() as folder:
    for x in np.load(sys.argv[1]):
        x[None].astype(np.float32).tofile(f"{folder}/x.bin")
        command = [program, f"--loadEngine={engine}", f"--loadInputs=input0:{folder}/x.bin", "--iterations=1"]
        command += ["--warmUp=0", "--duration=0", f"--exportOutput={folder}/y.json"]
        subprocess.run(command, stdout=sys.stderr, check=True)
        found = json.loads(Path(folder, "y.json").read_text(), strict=False)[0]["values"]
        outputs.append(np.array([found], np.float32))
np.save(sys.argv[2], np.concatenate(outputs))
