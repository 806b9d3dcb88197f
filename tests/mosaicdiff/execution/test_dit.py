"""Fused execution of DiT: equal to diffusers' own, with fewer operations, undone exactly."""

import copy
import inspect

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

import mosaicdiff
from tests.mosaicdiff.conftest import tiny_denoiser, tiny_pipeline
from tests.mosaicdiff.cutting import pack

#: Uneven; attention gone; FFN gone; a block gone.
KEPT = {
    "transformer_blocks.0.attn1": [0, 2, 3], "transformer_blocks.0.ff": list(range(5, 70)),
    "transformer_blocks.1.attn1": [], "transformer_blocks.1.ff": list(range(8)),
    "transformer_blocks.2.ff": [], "transformer_blocks.3.attn1": [], "transformer_blocks.3.ff": [],
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Count what is dispatched; views and other free calls too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Operations.count += 1
        return func(*args, **(kwargs or {}))


def operations(model, inputs):
    Operations.count = 0
    with torch.no_grad(), Operations():
        model(*inputs)
    return Operations.count


def equal_embedders(model):
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def call(model, inputs):
    with torch.no_grad():
        return model(*inputs).sample


def sample_inputs(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(rows, 2, 8, 8, generator=generator).to(dtype)
    return latents, torch.arange(rows) * 300 + 7, torch.arange(rows) % 10


def differs(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=["equal embedders", "own embedders"])
def dense(request):
    model = tiny_denoiser(layers=4)
    model.double()
    return equal_embedders(model) if request.param == "equal embedders" else model


@pytest.mark.parametrize("cut", [False, True], ids=["dense", "cut"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_equals_eager_on_off_on(dense, cut, rows):
    model = pack(dense, KEPT) if cut else dense
    inputs = sample_inputs(rows)
    eager = call(model, inputs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forwards = {name for name, m in model.named_modules() if "forward" in m.__dict__}
    for _ in range(2):
        mosaicdiff.optimize(model)
        assert differs(call(model, inputs), eager) < 1e-12
        held = model.state_dict()
        assert list(held) == list(state)
        assert all(torch.equal(held[name], tensor) for name, tensor in state.items())
        mosaicdiff.restore(model)
        assert torch.equal(call(model, inputs), eager)
        assert {n for n, m in model.named_modules() if "forward" in m.__dict__} == forwards
        storages = [p.untyped_storage().nbytes() == p.nbytes for p in model.parameters()]
        assert all(storages)


def test_holds_no_weight_twice():
    model = equal_embedders(tiny_denoiser())
    mosaicdiff.optimize(model)
    attention = model.transformer_blocks[0].attn1
    storages = {attention.get_submodule(n).weight.untyped_storage().data_ptr() for n in
                ("to_q", "to_k", "to_v")}  # fmt: skip
    assert len(storages) == 1
    norms = {b.norm1.linear.weight.untyped_storage().data_ptr() for b in model.transformer_blocks}
    assert norms == {model.proj_out_1.weight.untyped_storage().data_ptr()}


def test_needs_fewer_operations():
    model = equal_embedders(tiny_denoiser(layers=28))
    inputs = sample_inputs(2, torch.float32)
    before = operations(model, inputs)
    mosaicdiff.optimize(model)
    after = operations(model, inputs)
    # Views included: of real work there are 13 operations a block, 11 of one sample.
    assert after < 0.7 * before, (before, after)
    mosaicdiff.restore(model)
    assert operations(model, inputs) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_a_cast(dtype):
    model = equal_embedders(tiny_denoiser())
    exact = call(copy.deepcopy(model).double(), sample_inputs(2))
    inputs = sample_inputs(2, dtype)
    eager = call(copy.deepcopy(model).to(dtype), inputs)
    mosaicdiff.optimize(model)
    model.to(dtype)
    fused = call(model, inputs)
    assert fused.dtype == dtype
    # As near to float64 as the eager run in this type.
    assert differs(fused.double(), exact) < 2 * differs(eager.double(), exact)


def test_follows_a_loaded_state():
    model, other = equal_embedders(tiny_denoiser()), equal_embedders(tiny_denoiser())
    for parameter in other.parameters():
        parameter.mul_(1.5)
    inputs = sample_inputs(2, torch.float32)
    wanted = call(other, inputs)
    for assign in (False, True):
        fused = equal_embedders(tiny_denoiser())
        mosaicdiff.optimize(fused)
        fused.load_state_dict(other.state_dict(), assign=assign)
        assert differs(call(fused, inputs), wanted) < 1e-5
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3] += 1
    mosaicdiff.optimize(model)  # which is not equal to the others any more
    assert differs(call(model, inputs), call(fused, inputs)) > 1e-3


def test_notices_embedders_that_differ_later():
    model = equal_embedders(tiny_denoiser())
    mosaicdiff.optimize(model)
    model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3] += 1
    with pytest.raises(RuntimeError, match="embedders that were equal were changed"):
        call(model, sample_inputs(2, torch.float32))
    mosaicdiff.restore(model)
    call(model, sample_inputs(2, torch.float32))


@pytest.mark.parametrize("where", ["attn1.to_k", "attn1.to_out.0", "ff.net.2"])
def test_notices_a_replaced_layer(where):
    model = tiny_denoiser()
    mosaicdiff.optimize(model)
    block = model.transformer_blocks[1]
    owner, _, name = where.rpartition(".")
    linear = block.get_submodule(where)
    block.get_submodule(owner)._modules[name] = torch.nn.Linear(
        linear.in_features, linear.out_features
    )
    with pytest.raises(RuntimeError, match="must be the layer that was optimized"):
        call(model, sample_inputs(1, torch.float32))


def test_copies_are_optimized_themselves():
    model = equal_embedders(tiny_denoiser())
    inputs = sample_inputs(2, torch.float32)
    mosaicdiff.optimize(model)
    fused = call(model, inputs)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(call(other, inputs), fused)
    mosaicdiff.restore(other)
    assert differs(call(other, inputs), fused) < 1e-5


@pytest.mark.parametrize("where", ["attn1", "ff", "ff.net.2"])
def test_hooks_that_come_later_run(where):
    model = tiny_denoiser()
    mosaicdiff.optimize(model)
    called = []
    for block in model.transformer_blocks:
        block.get_submodule(where).register_forward_hook(lambda *args: called.append(1))
    call(model, sample_inputs(1, torch.float32))
    assert len(called) == len(model.transformer_blocks)


def test_says_what_it_takes():
    model = tiny_denoiser()
    taken = inspect.signature(model.forward)
    mosaicdiff.optimize(model)
    assert inspect.signature(model.forward) == taken


def test_saves_the_same_file(tmp_path):
    model = tiny_denoiser()
    model.save_pretrained(tmp_path / "before")
    mosaicdiff.optimize(model)
    model.save_pretrained(tmp_path / "during")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "during" / name).read_bytes()


def test_needs_evaluation_without_gradients():
    model = tiny_denoiser()
    inputs = sample_inputs(1, torch.float32)
    mosaicdiff.optimize(model)
    with pytest.raises(RuntimeError, match="must be in evaluation mode"):
        call(model.train(), inputs)
    model.eval().requires_grad_(True)
    with pytest.raises(RuntimeError, match="gives parameters no gradients"):
        model(*inputs)
    call(model, inputs)


def test_refusals():
    model = tiny_denoiser()
    with pytest.raises(ValueError, match="model must be a pipeline or its denoiser, got int"):
        mosaicdiff.optimize(5)
    with pytest.raises(ValueError, match="one of fuse, compile and cuda_graphs must be True"):
        mosaicdiff.optimize(model, fuse=False)
    with pytest.raises(RuntimeError, match="cuda_graphs needs the model on a CUDA device, got cpu"):
        mosaicdiff.optimize(model, cuda_graphs=True)
    mosaicdiff.optimize(model)
    with pytest.raises(ValueError, match="must not be optimized already. Call mosaicdiff.restore"):
        mosaicdiff.optimize(model)
    with pytest.raises(ValueError, match="must be called with timestep and class_labels"):
        call(model, sample_inputs(1, torch.float32)[:1])
    mosaicdiff.restore(model)
    mosaicdiff.restore(model)  # nothing to undo
    model.transformer_blocks[0].attn1.residual_connection = True
    with pytest.raises(ValueError, match="attention must be without residual_connection"):
        mosaicdiff.optimize(model)


def test_an_optimized_model_is_not_pruned(pipe):
    mosaicdiff.optimize(pipe)
    with pytest.raises(ValueError, match="must not be optimized"):
        mosaicdiff.check_prunable(pipe)
    mosaicdiff.restore(pipe)
    mosaicdiff.check_prunable(pipe)


def test_caches_go_on_top():
    model = equal_embedders(tiny_denoiser(layers=4))
    inputs = sample_inputs(2, torch.float32)
    eager = call(model, inputs)
    mosaicdiff.optimize(model)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    _set_cache_context(model, CacheContext("one"))  # as models with a cache of their own do
    assert differs(call(model, inputs), eager) < 1e-5
    with pytest.raises(ValueError, match="must be without hooks"):
        mosaicdiff.restore(model)
    other = tiny_denoiser()
    apply_first_block_cache(other, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="after mosaicdiff.optimize it may go on"):
        mosaicdiff.optimize(other)


class TestStaged:
    """All stages of a pruned pipeline."""

    @pytest.fixture
    def pruned(self, denoiser, batches):
        pipe = tiny_pipeline(equal_embedders(denoiser))
        mosaicdiff.prune(
            pipe,
            mosaicdiff.PruneConfig(sparsity=0.4, steps=10, weighting="raw"),
            calibration=batches,
        )
        return pipe

    @staticmethod
    def sampled(pipe, guidance=1.0):
        return pipe(
            [1, 2], generator=torch.Generator().manual_seed(5), num_inference_steps=10,
            guidance_scale=guidance, output_type="np",
        ).images  # fmt: skip

    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_samples_the_same_pictures(self, pruned, guidance):
        eager = self.sampled(pruned, guidance)
        mosaicdiff.optimize(pruned)
        assert abs(self.sampled(pruned, guidance) - eager).max() < 1e-4
        mosaicdiff.restore(pruned)
        assert (self.sampled(pruned, guidance) == eager).all()

    def test_saves_and_loads(self, pruned, tmp_path):
        pruned.save_pretrained(tmp_path / "before")
        mosaicdiff.optimize(pruned)
        pruned.save_pretrained(tmp_path / "during")
        name = "transformer/diffusion_pytorch_model.safetensors"
        before, during = ((tmp_path / part / name).read_bytes() for part in ("before", "during"))
        assert before == during

    def test_stages_share_the_joined_weights(self, pruned):
        staged = pruned.transformer

        def held():
            storages = (p.untyped_storage() for p in staged.parameters())
            return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

        before = held()
        mosaicdiff.optimize(pruned)
        assert held() == before

    def test_compiles_each_stage_once(self, pruned):
        graphs = []

        def backend(graph, example):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        eager = self.sampled(pruned)
        mosaicdiff.optimize(pruned, compile={"backend": backend, "fullgraph": True})
        compiled = self.sampled(pruned)
        assert abs(compiled - eager).max() < 1e-4
        stages = len(pruned.transformer.stage_models)
        assert stages > 1
        assert len(graphs) == stages
        self.sampled(pruned)
        assert len(graphs) == stages

    def test_compiles_without_fusing(self, pruned):
        torch._dynamo.reset()
        eager = self.sampled(pruned)
        mosaicdiff.optimize(pruned, fuse=False, compile={"backend": "eager"})
        assert abs(self.sampled(pruned) - eager).max() < 1e-5


def test_other_processors_are_not_run_past(pipe):
    class Doubled(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    pipe.transformer.transformer_blocks[0].attn1.processor = Doubled()
    with pytest.raises(ValueError, match="the processor of .* must be"):
        mosaicdiff.optimize(pipe)
