"""What the kernels cost, read from their machine code: no GPU needed, nothing measured.

    python -m benchmarks.compile_report [--json] ["sm_90 info_nce 512" ...]

``launches.py`` calls the launchers with a driver that compiles and runs nothing, ``disassembly.py``
reads the compiled code, ``report.py`` prints registers, memory and instructions.
"""
