"""The models of the acceptance list, each a function of the width. None of them knows of this project."""

import math

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 10


class MLP(nn.Module):
    def __init__(self, d, inputs=16, outputs=CLASSES):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(inputs, d), nn.Linear(d, d), nn.Linear(d, d)
        self.head = nn.Linear(d, outputs)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        return self.head(torch.tanh(self.third(x)))


class CNN(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.stem = nn.Conv2d(3, d, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(d)
        self.body = nn.Conv2d(d, 2 * d, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * d)
        self.head = nn.Conv2d(2 * d, CLASSES, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm2(self.body(x)))
        return self.head(x).mean((2, 3))


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, d, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d)
        self.stages = nn.Sequential(Block(d, d, 1), Block(d, 2 * d, 2), Block(2 * d, 4 * d, 2))
        self.fc = nn.Linear(4 * d, CLASSES)

    def forward(self, x):
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """nanoGPT's attention, with the scores written out where `manual`."""

    def __init__(self, d, heads, manual):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.heads, self.manual = heads, manual
        self.scores = nn.Identity()

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        if self.manual:
            scores = self.scores((q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1))))
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            y = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GPTBlock(nn.Module):
    def __init__(self, d, heads, manual):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, heads, manual)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Heads grow with a head dimension of 16, unless `heads` fixes their number."""

    def __init__(self, d, heads=None, tie=False, manual=False, vocab=61, length=32, layers=2):
        super().__init__()
        heads = heads or d // 16
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.h = nn.ModuleList(GPTBlock(d, heads, manual) for _ in range(layers))
        self.ln_f = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, vocab, bias=False)
        if tie:
            self.wte.weight = self.lm_head.weight

    def forward(self, idx):
        _, t = idx.size()
        x = self.wte(idx) + self.wpe(torch.arange(t, device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def encoder(d):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(d, d // 16, 4 * d, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    )


def gpt2(d):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=d, n_layer=2, n_head=d // 16, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0))


def llama(d):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=d, intermediate_size=3 * d, num_hidden_layers=2, num_attention_heads=d // 16, num_key_value_heads=d // 32,
                    vocab_size=61, max_position_embeddings=32)
    )  # fmt: skip


def bert(d):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(hidden_size=d, intermediate_size=4 * d, num_hidden_layers=2, num_attention_heads=d // 16, vocab_size=61,
                   max_position_embeddings=32, num_labels=3)
    )  # fmt: skip


def vit(d):
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=d,
            intermediate_size=4 * d,
            num_hidden_layers=2,
            num_attention_heads=d // 16,
            image_size=32,
            patch_size=8,
            num_labels=7,
        )
    )


def ids(_=None):
    return (torch.arange(16).reshape(2, 8) % 3 + 1,)


MODELS = {
    "MLP": (MLP, None),
    "CNN": (CNN, None),
    "ResNet": (ResNet, None),
    "GPT": (GPT, None),
    "GPT, written-out attention": (lambda d: GPT(d, manual=True), None),
    "GPT, tied": (lambda d: GPT(d, tie=True), None),
    "TransformerEncoder": (encoder, lambda d: (torch.zeros(2, 8, d),)),
    "GPT-2": (gpt2, None),
    "Llama": (llama, None),
    "BERT": (bert, None),
    "ViT": (vit, None),
}
