"""Calls the native module on a system of exact numbers, without torch, and prints the instruction set it took.

    python tests/old_processor.py <path of the module>

Runs under an emulated processor (tests/test_portable.py), which stops at the first instruction it does not have.
"""

import ctypes
import importlib.util
import sys

B, M, D = 3, 3, 37  # samples, rows, features
RMS, FLOAT32, MIX = 0, 1, 1  # as in csrc


def load(path):
    ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)  # the module names none: elsewhere torch has loaded one
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path):
    native = load(path)
    address = ctypes.addressof
    R, F = ((ctypes.c_float * (B * M * D))() for _ in range(2))
    gram, rhs = (ctypes.c_double * (B * M * M))(), (ctypes.c_double * (B * M))()
    squares, count = (ctypes.c_double * (2 * B))(), (ctypes.c_int32 * B)()
    solve = native.Solve(
        FLOAT32, M, 0, 1e-7, B, 1, D, M * D, D, False, 0, 0.0, 1.0, address(R), address(F), address(gram), 0,
        address(rhs), address(squares), address(count), 0.0, float(D), RMS, 0.0, False, 1,
    )  # fmt: skip
    rows, modes = (ctypes.c_int64 * B)(*range(B)), (ctypes.c_uint8 * B)(*[MIX] * B)
    dropped = (ctypes.c_int32 * B)()
    z = (ctypes.c_float * (B * D))()
    for step in range(1, 4):
        # f = A z + b with A = ½: integers and halves, which float32 holds exactly.
        f = (ctypes.c_float * (B * D))(*[0.5 * x + (i % 5 + 1) for i, x in enumerate(z)])
        norms, following = (ctypes.c_double * (2 * B))(), (ctypes.c_float * (B * D))()
        shared = (solve, step % M, B, address(rows))
        native.measure(*shared, 0, address(f), address(z), address(norms), 1, 0, 0)
        expected = [sum((f[i * D + k] - z[i * D + k]) ** 2 for k in range(D)) for i in range(B)]
        assert list(norms[::2]) == expected, (list(norms[::2]), expected)
        native.advance(*shared, address(modes), 0, address(dropped), address(z), address(following), 1, 0, 0)
        z = following
    # Residuals of f = ½ z + b lie on one line, so Anderson's second step is exact: z = 2 b.
    assert all(abs(x - 2 * (i % 5 + 1)) < 1e-5 for i, x in enumerate(z)), list(z)
    print(native.cpu_isa())


if __name__ == "__main__":
    main(sys.argv[1])
