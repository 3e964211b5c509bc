"""Programs that run on the device: Python 3.8 or newer, the standard library, numpy and one runtime.

`serve` answers JSON lines; `machine` describes the device; `timing` measures; one file per runtime compiles layers and
models. Never torch, never anything of the host toolkit: the folder travels as one zip named by its content.
"""
