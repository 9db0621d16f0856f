"""Networks without a closed form, for chains of any kind."""

import torch


class Rough(torch.nn.Module):
    """A network of some size that depends on x and t, and hears of the noise level by t alone.

    Computes in float64, and is defined also where there is no signal.
    """

    def __init__(self, size=12):
        super().__init__()
        self.weight = 0.3 * torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.eval()

    def forward(self, x, t):
        time = (t.double() / 1000)[:, None]
        return (1.5 * torch.tanh(x.double().flatten(1) @ self.weight + time) - time).reshape(x.shape).to(x)


def of_sdxl():
    """A small network of diffusers with SDXL's conditions: prompts (n, m, 12), pooled ones (n, 10), sizes (n, 6)."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    ).eval()  # fmt: skip
