"""Transformers and SDXL's network of diffusers, tiny and random, sampled as flows and diffusions: diffusers' loop."""

import pytest
import torch
from networks import of_sdxl

from diffusion import DiffusersModel, Schedule, invert, sample

diffusers = pytest.importorskip("diffusers")

FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def sd3():
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return (
        network,
        (2, 4, 8, 8),
        {"encoder_hidden_states": torch.randn(2, 3, 12), "pooled_projections": torch.randn(2, 10)},
    )


def flux():
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    return network, (2, 16, 4), {
        "encoder_hidden_states": torch.randn(2, 3, 12), "pooled_projections": torch.randn(2, 10),
        "txt_ids": torch.zeros(3, 3), "img_ids": torch.rand(16, 3).mul(4).round(), "guidance": torch.tensor([3.5, 3.5]),
    }  # fmt: skip


def loop(scheduler, ask, state, steps, channels=None):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        said = ask(state, t.expand(len(state))).sample
        state = scheduler.step(said if channels is None else said[:, :channels], t, state).prev_sample
    return state


@torch.no_grad()
@pytest.mark.parametrize("make", [sd3, flux])
def test_a_flow_transformer_is_sampled_and_inverted_with_its_conditions(make):
    network, shape, conditions = make()
    network.eval()
    unit = 1000 if make is flux else 1
    ask = lambda x, t: network(hidden_states=x, timestep=t / unit, **conditions)  # noqa: E731
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = loop(FLOW, ask, x, 8)
    inputs = [
        c if (len(c) == 2 and c.dim() != 2) or c.shape[0] == 2 else c.expand(2, *c.shape) for c in conditions.values()
    ]
    chain, model = Schedule.from_diffusers(FLOW).chain(8), DiffusersModel(network)
    for method in ("sequential", "parallel"):
        out = sample(model, x, chain, method, prediction="flow", inputs=inputs, error=1e-5)
        assert (out.x_0 - expected).norm() < 1e-4 * expected.norm(), method
    found = invert(model, expected, chain, prediction="flow", inputs=inputs)
    again = sample(model, found.x_T, chain, "sequential", prediction="flow", inputs=inputs).x_0
    assert (again - expected).square().mean().sqrt() < 1e-3


@torch.no_grad()
def test_a_class_transformer_with_learned_variances_is_sampled_by_its_mean():
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip
    scheduler, labels = diffusers.DDIMScheduler(clip_sample=False), torch.tensor([1, 7])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = loop(scheduler, lambda x, t: network(x, t, class_labels=labels), x, 8, channels=4)
    chain = Schedule.from_diffusers(scheduler).chain(8)
    out = sample(DiffusersModel(network), x, chain, inputs=(labels,), error=1e-5)
    assert (out.x_0 - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
def test_the_added_conditions_of_sdxl_are_inputs_like_the_others():
    network = of_sdxl()
    text, pooled, ids = torch.randn(2, 3, 12), torch.randn(2, 10), torch.randint(1, 9, (2, 6)).float()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 500])
    expected = network(x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    assert torch.equal(DiffusersModel(network)(x, t, text, pooled, ids), expected)
    with pytest.raises(ValueError, match=r"inputs: 3 \(encoder_hidden_states, text_embeds, time_ids\) are required"):
        DiffusersModel(network)(x, t, text)
