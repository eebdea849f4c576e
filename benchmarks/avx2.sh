#!/bin/bash
# Run a command as on a CPU without AVX-512: AVX2 is the widest instruction set of PyTorch, MKL, oneDNN, what torch.compile
# generates, and our kernels.
#
#     benchmarks/avx2.sh .venv/bin/pytest benchmarks/ --benchmark-only
export ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
export TORCHINDUCTOR_CPP_MARCH=x86-64-v3 DPH_CPU_CAPABILITY=avx2
exec "$@"
