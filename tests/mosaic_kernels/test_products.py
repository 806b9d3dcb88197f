"""The compiled product and solve, and the blocked ones of torch, against float64."""

import numpy as np
import pytest
import torch
from host_builds import host_program, needs_compiler, run

from mosaic_kernels import _products, prune
from mosaic_kernels._extension import EXTENSION

needs_extension = pytest.mark.skipif(EXTENSION.module is None, reason="needs the compiled module")
# (depth, n): one element, odd widths, more than one block of depth, of rows and of columns
SHAPES = [(1, 1), (5, 7), (3, 33), (64, 100), (257, 40), (600, 211), (20, 530)]
WIDE = {torch.float32: torch.float32, torch.float64: torch.float64}
NARROW = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(p, q):
    """Return P^T Q, summed in more than float64, in float64."""
    wide = [x.double().numpy().astype(np.longdouble) for x in (p, q)]
    return torch.from_numpy((wide[0].T @ wide[1]).astype(np.float64))


@pytest.mark.parametrize("depth, n", SHAPES)
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=str)
@needs_extension
def test_lower_product(depth, n, dtype, check_error):
    out = (WIDE | NARROW)[dtype]
    p, q = random(depth, n, dtype=dtype), random(depth, n, seed=1, dtype=dtype)
    start = random(n, n, seed=2, dtype=out)
    c = start.clone()
    _products.add_product_lower_(c, (p, q), (q, p), alpha=-0.5)
    assert torch.equal(c.triu(1), start.triu(1))  # the upper triangle is not touched
    truth = start.double() - 0.5 * (exact(p, q) + exact(q, p))
    a, b = p.to(out), q.to(out)
    by_torch = start - 0.5 * (a.T @ b + b.T @ a)
    check_error(c.tril(), by_torch.tril(), truth.tril())


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_strided_batched_product(dtype, check_error):
    p = random(3, 40, 90, dtype=dtype)[:, ::2, 5:75]
    c = torch.zeros(3, 200, 210, dtype=dtype)[:, 10:80, 20:90]
    _products.add_product_lower_(c, (p, p))
    truth = p.double().mT @ p.double()
    check_error(c.tril(), (p.mT @ p).tril(), truth.tril())


@pytest.mark.parametrize("k, m, n", [(1, 1, 1), (7, 5, 3), (300, 20, 90), (129, 250, 600)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_full_product(k, m, n, dtype, transposed, check_error):
    p = random(m, k, dtype=dtype).T if transposed else random(k, m, dtype=dtype)
    q = random(n, k, seed=1, dtype=dtype).T if transposed else random(k, n, seed=1, dtype=dtype)
    check_error(_products.product(p, q), p.T @ q, exact(p, q))


def test_subnormal_infinite_and_negative_half_precision():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[None]
        c = _products.product(torch.ones(1, 1), torch.zeros(1, 1))
        c = torch.zeros(1, x.shape[1])
        if EXTENSION.module is None:
            c = x.float()
        else:
            _products._call_cpp(c, ((torch.ones(1, 1), x),), 1.0, lower=False)
        assert torch.equal(c.nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))


@needs_extension
def test_threads_do_not_change_the_bits():
    x = random(700, 900, dtype=torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        c = torch.zeros(900, 900)
        _products.add_product_lower_(c, (x, x))
        results.append(c)
    assert torch.equal(*results)


@needs_extension
@pytest.mark.parametrize("n, rows", [(1, 1), (7, 3), (128, 20), (129, 1), (300, 40), (500, 260)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_solve(n, rows, dtype, check_error):
    x = random(2 * n, n)
    a = (x.T @ x / n + 0.1 * torch.eye(n, dtype=torch.float64)).to(dtype)
    b = random(rows, n, seed=1, dtype=dtype)
    lower_only = a.tril() + torch.full_like(a, float("nan")).triu(1).nan_to_num(nan=9.0).triu(1)
    solved, exists = prune.solve_cpp(lower_only, b.clone())
    assert exists
    truth = torch.linalg.solve(a.double(), b.double().T).T
    check_error(solved, prune.solve_torch(a, b)[0], truth)


@needs_extension
def test_solve_without_a_factor():
    a = torch.eye(200)
    a[150, 150] = -1.0
    assert not prune.solve_cpp(a, torch.ones(2, 200))[1]


@pytest.mark.kernels
@needs_compiler
@pytest.mark.parametrize("bits", [128, 256, 512])
def test_every_vector_width(bits, tmp_path):
    program = host_program("product_host", tmp_path, "-O2", f"-DMOSAIC_VECTOR_BITS={bits}")
    run(program)


@needs_extension
def test_bindings_refuse_what_they_cannot_do():
    c, x = torch.zeros(4, 4), torch.ones(2, 4)
    good = (x.data_ptr(), 0, 4, 1)
    module = EXTENSION.module
    for arguments, message in [
        ((c.data_ptr(), 3, [], 4, 4, 1.0, True, 4, 1), "columns must be between 1 and c_stride"),
        ((0, 4, [(good, good, 2)], 4, 4, 1.0, True, 4, 1), "c must be a non-null address"),
        ((c.data_ptr(), 4, [(good, good, -1)], 4, 4, 1.0, True, 4, 1), "depth must be at least 0"),
        ((c.data_ptr(), 4, [(good, good, 2)], 4, 4, 1.0, True, 8, 1), "operand must be f64"),
        ((c.data_ptr(), 4, [(good, good, 2)], 4, 4, 1.0, True, 2, 1), "element_bytes must be 4"),
    ]:
        with pytest.raises(ValueError, match=f"add_product: {message}"):
            module.add_product(*arguments)
