"""Images, volumes, generation: convolutions in every form, patches, grids."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from .model import Handwritten, floats


def image(*shape):
    return lambda d: (floats(*shape),)


class UNet(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem, self.down, self.middle = (
            nn.Conv2d(3, d, 3, padding=1),
            nn.Conv2d(d, 2 * d, 3, 2, 1),
            nn.Conv2d(2 * d, 2 * d, 3, padding=1),
        )
        self.up, self.merge, self.out = nn.ConvTranspose2d(2 * d, d, 2, 2), nn.Conv2d(2 * d, d, 3, padding=1), nn.Conv2d(d, 3, 1)

    def forward(self, x):
        skip = F.relu(self.stem(x))
        x = F.relu(self.middle(F.relu(self.down(skip))))
        return self.out(F.relu(self.merge(torch.cat([self.up(x), skip], 1))))


class Separable(nn.Module):
    """Depthwise, then pointwise, with squeeze and excitation (MobileNet, EfficientNet)."""

    def __init__(self, d):
        super().__init__()
        self.stem, self.depthwise, self.pointwise = (
            nn.Conv2d(3, d, 3, 2, 1, bias=False),
            nn.Conv2d(d, d, 3, 1, 1, groups=d, bias=False),
            nn.Conv2d(d, 2 * d, 1, bias=False),
        )
        self.norm, self.squeeze, self.excite, self.head = (
            nn.BatchNorm2d(d),
            nn.Conv2d(d, d // 4, 1),
            nn.Conv2d(d // 4, d, 1),
            nn.Linear(2 * d, 10),
        )

    def forward(self, x):
        x = F.hardswish(self.norm(self.depthwise(self.stem(x))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.pointwise(x).mean((2, 3)))


class ResNeXt(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem, self.grouped, self.norm, self.fc = (
            nn.Conv2d(3, d, 7, 2, 3),
            nn.Conv2d(d, d, 3, 1, 1, groups=4),
            nn.GroupNorm(4, d),
            nn.Linear(d, 10),
        )

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.fc((x + F.relu(self.norm(self.grouped(x)))).mean((-2, -1)))


class Video(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.space, self.time, self.norm, self.head = (
            nn.Conv3d(3, d, (1, 3, 3)),
            nn.Conv3d(d, d, (3, 1, 1)),
            nn.InstanceNorm3d(d, affine=True),
            nn.Linear(d, 6),
        )

    def forward(self, x):
        return self.head(self.norm(self.time(F.relu(self.space(x)))).mean((2, 3, 4)))


class Flattened(nn.Module):
    """LeNet: a classifier on the flattened map."""

    def __init__(self, d):
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = nn.Conv2d(1, d, 5), nn.Conv2d(d, d, 5), nn.Linear(d * 16, 2 * d), nn.Linear(2 * d, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(x.shape[0], -1))))


class SuperResolution(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem, self.expand, self.out = nn.Conv2d(3, d, 3, padding=1), nn.Conv2d(d, 4 * d, 3, padding=1), nn.Conv2d(d, 3, 3, padding=1)

    def forward(self, x):
        x = F.pixel_shuffle(self.expand(F.leaky_relu(self.stem(x))), 2)
        return self.out(x) + 0


class Swin(nn.Module):
    """Windows, a relative table inside them, patch merging."""

    def __init__(self, d, head=4, window=2):
        super().__init__()
        self.heads, self.window = d // head, window
        self.patch, self.qkv, self.proj = nn.Conv2d(3, d, 4, 4), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.heads))
        self.norm, self.merge, self.head = nn.LayerNorm(4 * d), nn.Linear(4 * d, 2 * d, bias=False), nn.Linear(2 * d, 10)
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", relative[..., 0] * (2 * window - 1) + relative[..., 1])

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.window
        y = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        y = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5 + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, s * s, c))
        x = x + y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.merge(self.norm(x)).mean((1, 2)))


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over tokens (which stay), one over channels."""

    def __init__(self, d, tokens=16, hidden=24):
        super().__init__()
        self.patch, self.norm1, self.norm2, self.head = nn.Conv2d(3, d, 4, 4), nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 10)
        self.token1, self.token2, self.channel1, self.channel2 = (
            nn.Linear(tokens, hidden),
            nn.Linear(hidden, tokens),
            nn.Linear(d, 4 * d),
            nn.Linear(4 * d, d),
        )

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = x + self.token2(F.gelu(self.token1(self.norm1(x).mT))).mT
        x = x + self.channel2(F.gelu(self.channel1(self.norm2(x))))
        return self.head(x.mean(1))


class VisionTransformer(nn.Module):
    """Class and register tokens, a position table resized to the grid, LayerScale."""

    def __init__(self, d):
        super().__init__()
        self.patch, self.cls, self.registers = nn.Conv2d(3, d, 4, 4), nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 2, d))
        self.positions = nn.Parameter(torch.zeros(1, 9, d))
        self.block, self.gamma = nn.TransformerEncoderLayer(d, d // 4, 2 * d, batch_first=True), nn.Parameter(torch.full((d,), 1e-4))
        self.head = nn.Linear(d, 10)

    def forward(self, x):
        x = self.patch(x)
        grid = self.positions.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        x = x + F.interpolate(grid, size=x.shape[-2:], mode="bicubic", align_corners=False)
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.registers.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        return self.head((x + self.gamma * self.block(x))[:, 0])


class DiT(nn.Module):
    """A diffusion transformer: patches, adaptive layer norm from the class and time, an unpatchifying head."""

    def __init__(self, d):
        super().__init__()
        self.patch, self.label, self.time = nn.Linear(12, d), nn.Embedding(5, d), nn.Sequential(nn.Linear(8, d), nn.SiLU(), nn.Linear(d, d))
        self.modulate, self.attention, self.norm = (
            nn.Linear(d, 6 * d),
            nn.MultiheadAttention(d, d // 4, batch_first=True),
            nn.LayerNorm(d, elementwise_affine=False),
        )
        self.mlp, self.final, self.out = (
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)),
            nn.Linear(d, 2 * d),
            nn.Linear(d, 12),
        )

    def forward(self, x, t, y):
        angles = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(4) / 4)
        c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(y))
        b, ch, h, w = x.shape
        x = self.patch(x.reshape(b, ch, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 12))
        s1, g1, a1, s2, g2, a2 = self.modulate(c)[:, None].chunk(6, -1)
        z = self.norm(x) * (1 + g1) + s1
        x = x + a1 * self.attention(z, z, z, need_weights=False)[0]
        x = x + a2 * self.mlp(self.norm(x) * (1 + g2) + s2)
        shift, gain = self.final(c)[:, None].chunk(2, -1)
        x = self.out(self.norm(x) * (1 + gain) + shift).view(b, h // 2, w // 2, ch, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(b, ch, h, w)


class FiLM(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem, self.condition, self.conv, self.head = nn.Conv2d(3, d, 3), nn.Linear(6, 2 * d), nn.Conv2d(d, d, 3), nn.Linear(d, 4)

    def forward(self, x, c):
        gain, shift = self.condition(c)[..., None, None].chunk(2, 1)
        return self.head(F.relu(self.conv(F.relu(self.stem(x))) * gain + shift).amax((2, 3)))


class VectorQuantized(nn.Module):
    """VQ-VAE: the nearest code replaces the encoder's output, straight through."""

    def __init__(self, d, codes=8):
        super().__init__()
        self.encode, self.codes, self.decode = nn.Conv2d(3, d, 4, 4), nn.Embedding(codes, d), nn.ConvTranspose2d(d, 3, 4, 4)
        self.mix = nn.Conv2d(d, d, 1)

    def forward(self, x):
        z = self.mix(self.encode(x)).permute(0, 2, 3, 1)
        distances = z.pow(2).sum(-1, keepdim=True) - 2 * z @ self.codes.weight.T + self.codes.weight.pow(2).sum(-1)
        quantized = self.codes(distances.argmin(-1))
        loss = F.mse_loss(quantized, z.detach()) + 0.25 * F.mse_loss(z, quantized.detach())
        return self.decode((z + (quantized - z).detach()).permute(0, 3, 1, 2)), loss


class Variational(nn.Module):
    def __init__(self, d, latent=3):
        super().__init__()
        self.encode, self.mean, self.log_variance = nn.Linear(16, d), nn.Linear(d, latent), nn.Linear(d, latent)
        self.decode, self.out = nn.Linear(latent, d), nn.Linear(d, 16)

    def forward(self, x):
        h = torch.relu(self.encode(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        return torch.sigmoid(self.out(torch.relu(self.decode(z)))), mean, log_variance


class Generator(nn.Module):
    def __init__(self, d, latent=6):
        super().__init__()
        self.project, self.norm, self.up, self.out = (
            nn.Linear(latent, 4 * 4 * 2 * d),
            nn.BatchNorm2d(2 * d),
            nn.ConvTranspose2d(2 * d, d, 4, 2, 1),
            nn.ConvTranspose2d(d, 3, 4, 2, 1),
        )

    def forward(self, z):
        x = self.project(z).view(z.shape[0], -1, 4, 4)
        return torch.tanh(self.out(F.relu(self.up(F.relu(self.norm(x))))))


class Discriminator(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.second = (parametrizations.spectral_norm(nn.Conv2d(i, o, 4, 2, 1)) for i, o in ((3, d), (d, 2 * d)))
        self.score = parametrizations.weight_norm(nn.Linear(2 * d, 1))

    def forward(self, x):
        return self.score(F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2).sum((2, 3)))


class Detector(nn.Module):
    """Three scales, one shared head, anchors: a growing map to a few boxes and classes."""

    def __init__(self, d, anchors=3, classes=4):
        super().__init__()
        self.classes = classes
        self.stages = nn.ModuleList([nn.Conv2d(3, d, 3, 2, 1), nn.Conv2d(d, 2 * d, 3, 2, 1), nn.Conv2d(2 * d, 4 * d, 3, 2, 1)])
        self.lateral = nn.ModuleList([nn.Conv2d(d * k, d, 1) for k in (1, 2, 4)])
        self.head = nn.Conv2d(d, anchors * (5 + classes), 3, padding=1)

    def forward(self, x):
        maps = [x := F.silu(stage(x)) for stage in self.stages]
        top, out = None, []
        for lateral, features in zip(reversed(self.lateral), reversed(maps), strict=True):
            features = lateral(features)
            top = features if top is None else features + F.interpolate(top, scale_factor=2, mode="nearest")
            out.append(self.head(top).unflatten(1, (-1, 5 + self.classes)).permute(0, 1, 3, 4, 2).flatten(1, 3))
        return torch.cat(out, 1)


class MaskHead(nn.Module):
    """Learned queries against a pixel map (Mask2Former, SAM)."""

    def __init__(self, d):
        super().__init__()
        self.pixels, self.queries, self.attention, self.mask, self.label = (
            nn.Conv2d(3, d, 4, 4),
            nn.Embedding(5, d),
            nn.MultiheadAttention(d, d // 4, batch_first=True),
            nn.Linear(d, d),
            nn.Linear(d, 6),
        )

    def forward(self, x):
        x = self.pixels(x)
        q = self.queries.weight[None].expand(len(x), -1, -1)
        memory = x.flatten(2).mT
        q = self.attention(q, memory, memory, need_weights=False)[0]
        return torch.einsum("bqc,bchw->bqhw", self.mask(q), x), self.label(q)


class Radiance(nn.Module):
    """NeRF: sines of the coordinates, a skip that concatenates them again."""

    def __init__(self, d):
        super().__init__()
        self.a, self.b, self.density, self.colour = nn.Linear(12, d), nn.Linear(d + 12, d), nn.Linear(d, 1), nn.Linear(d, 3)

    def forward(self, x):
        x = (x[..., None] * 2.0 ** torch.arange(2)).flatten(-2)
        x = torch.cat([x.sin(), x.cos()], -1)
        h = F.relu(self.b(torch.cat([F.relu(self.a(x)), x], -1)))
        return F.softplus(self.density(h)), torch.sigmoid(self.colour(h))


VISION = {
    "unet": Handwritten(
        UNet, image(2, 3, 8, 8), "input: stem.weight\noutput: out.weight\nscalar: out.bias\nhidden: *.weight\nvector: *.bias"
    ),
    "separable_convolutions": Handwritten(
        Separable,
        image(2, 3, 16, 16),
        "input: stem.weight\nvector: norm.* depthwise.weight squeeze.bias excite.bias\noutput: head.weight\nscalar: head.bias\n"
        "hidden: *.weight",
    ),
    "grouped_convolution": Handwritten(
        ResNeXt,
        image(2, 3, 32, 32),
        "input: stem.weight\nvector: norm.* stem.bias grouped.bias\nhidden: grouped.weight\noutput: fc.weight\nscalar: fc.bias",
    ),
    "video": Handwritten(
        Video,
        image(2, 3, 4, 8, 8),
        "input: space.weight\nhidden: time.weight\nvector: norm.* space.bias time.bias\noutput: head.weight\nscalar: head.bias",
    ),
    "flattened_map": Handwritten(
        Flattened,
        image(2, 1, 28, 28),
        "input: conv1.weight\nhidden: conv2.weight fc1.weight\noutput: fc2.weight\nscalar: fc2.bias\nvector: *.bias",
    ),
    "pixel_shuffle": Handwritten(
        SuperResolution,
        image(2, 3, 6, 6),
        "input: stem.weight\nhidden: expand.weight\noutput: out.weight\nscalar: out.bias\nvector: *.bias",
    ),
    "windows_and_patch_merging": Handwritten(
        Swin,
        image(2, 3, 16, 16),
        "input: patch.weight\nembedding: table\nvector: patch.bias qkv.bias proj.bias norm.*\n"
        "hidden: qkv.weight proj.weight merge.weight\noutput: head.weight\nscalar: head.bias",
    ),
    "mlp_mixer": Handwritten(
        Mixer,
        image(2, 3, 16, 16),
        "input: patch.weight\nscalar: token* head.bias\nhidden: channel?.weight\nvector: norm* *.bias\noutput: head.weight",
    ),
    "vision_transformer": Handwritten(
        VisionTransformer,
        image(2, 3, 16, 16),
        "input: patch.weight positions\nembedding: registers\nvector: cls gamma patch.bias *norm* block.*bias\n"
        "hidden: block.*weight\noutput: head.weight\nscalar: head.bias",
    ),
    "diffusion_transformer": Handwritten(
        DiT,
        lambda d: (floats(2, 3, 4, 4), floats(2), torch.tensor([0, 3])),
        "input: patch.weight time.0.weight\nembedding: label.weight\n"
        "hidden: time.2.weight modulate.weight attention.*weight mlp.?.weight final.weight\n"
        "output: out.weight\nscalar: out.bias\nvector: *bias",
    ),
    "film": Handwritten(
        FiLM,
        lambda d: (floats(2, 3, 8, 8), floats(2, 6)),
        "input: stem.weight condition.weight\nhidden: conv.weight\noutput: head.weight\nscalar: head.bias\nvector: *.bias",
    ),
    "vector_quantized": Handwritten(
        VectorQuantized,
        image(2, 3, 8, 8),
        "input: encode.weight\nembedding: codes.weight\nhidden: mix.weight\noutput: decode.weight\nscalar: decode.bias\nvector: *.bias",
    ),
    "variational": Handwritten(
        Variational,
        lambda d: (floats(3, 16),),
        "input: encode.weight decode.weight\noutput: mean.weight log_variance.weight out.weight\n"
        "scalar: mean.bias log_variance.bias out.bias\nvector: *.bias",
    ),
    "generator": Handwritten(
        Generator,
        lambda d: (floats(3, 6),),
        "input: project.weight\nvector: project.bias norm.* up.bias\nhidden: up.weight\noutput: out.weight\nscalar: out.bias",
    ),
    "discriminator": Handwritten(
        Discriminator,
        image(2, 3, 4, 4),
        "input: first.*weight*\nhidden: second.*weight*\nscalar: score.bias *original0\noutput: score.*original1\nvector: *bias",
    ),
    "detector": Handwritten(
        Detector, image(1, 3, 32, 32), "input: stages.0.weight\noutput: head.weight\nscalar: head.bias\nhidden: *.weight\nvector: *.bias"
    ),
    "mask_queries": Handwritten(
        MaskHead,
        image(2, 3, 16, 16),
        "input: pixels.weight\nembedding: queries.weight\nhidden: attention.*weight mask.weight\noutput: label.weight\n"
        "scalar: label.bias\nvector: *bias",
    ),
    "radiance_field": Handwritten(
        Radiance,
        lambda d: (floats(5, 3),),
        "input: a.weight\nhidden, input: b.weight\noutput: density.weight colour.weight\nscalar: density.bias colour.bias\nvector: *.bias",
    ),
}
