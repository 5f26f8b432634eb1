import numpy as np, triton.language as tl
from triton.runtime import interpreter as I
def f(h):
    if h.dtype.scalar == tl.bfloat16: return (h.data.astype(np.uint32) << 16).view(np.float32)
    return h.data
I.InterpreterBuilder.create_dot = lambda self, a, b, d, ip, m: I.TensorHandle(np.matmul(f(a), f(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)
