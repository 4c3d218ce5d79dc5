"""Devices and processes (engine.py), memory measurement (memory_meter.py), advice after memory ran out (oom_advice.py),
offloading (module_offload.py, mapped_weights.py), readback from the device (async_readback.py) and CPU settings
(cpu_tuning.py).

May import `errors`, `utils` and `config`.
"""
