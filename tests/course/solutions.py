"""Solutions of the exercises, written as a student would: by number, the text of the function's file."""

IMPORTS = """\
import math

import torch
import torch.nn.functional as F

from minidrag.networks.layers import attention
from minidrag.method.drag import Cell, Origin, all_arrived, arrived, drag, patch, sample
from minidrag.method.dragdiffusion import observer, supervisor

"""

SOLUTIONS = {
    1: """
def step(schedule, latent, noise, start, end):
    a_start, a_end = schedule.alpha(start), schedule.alpha(end)
    clean = (latent - (1 - a_start).sqrt() * noise) / a_start.sqrt()
    return a_end.sqrt() * clean + (1 - a_end).sqrt() * noise
""",
    2: """
def invert(denoiser, latent, levels):
    for level in range(1, levels + 1):
        with torch.no_grad():
            noise, _, _ = denoiser(latent, level)
            latent = denoiser.step(latent, noise, level - 1, level)
        yield latent
""",
    3: """
def sample(features, points):
    rows, columns = features.shape[1:]
    row, column = points[:, 0].clamp(0, rows - 1), points[:, 1].clamp(0, columns - 1)
    r, c = row.floor().long(), column.floor().long()
    r1, c1 = (r + 1).clamp(max=rows - 1), (c + 1).clamp(max=columns - 1)
    d, e = row - r, column - c
    upper = (1 - e) * features[:, r, c] + e * features[:, r, c1]
    lower = (1 - e) * features[:, r1, c] + e * features[:, r1, c1]
    return (1 - d) * upper + d * lower
""",
    4: """
def motion_loss(features, handles, targets, reference, config):
    source = reference.view.features.detach()
    total = features.sum() * 0
    for i, (handle, target) in enumerate(zip(handles, targets)):
        if arrived(handle, target, config.tolerance):
            continue
        distance = math.dist(handle, target)
        length = min(config.motion_step, max(distance, 1.0))
        d = torch.tensor([length * (g - h) / distance for h, g in zip(handle, target)]).to(features)
        q = patch(handle, config.motion_radius, features)
        start = torch.tensor(reference.handles[i]).to(q)
        before = sample(source, q + (start - torch.tensor(handle).to(q)))
        difference = (sample(features, q + d) - before).abs()
        if config.motion_loss == "sum":
            total = total + difference.sum()
        else:
            total = total + difference.mean() * (2 * config.motion_radius + 1) ** 2
    return total
""",
    5: """
def track(features, handles, origin, radius):
    matches = []
    for handle, start in zip(handles, origin.handles):
        reference = origin.view.features[:, int(start.row), int(start.column)]
        q = patch(handle, radius, features)
        at = features.detach()[:, q[:, 0].long(), q[:, 1].long()]
        best = (at - reference[:, None]).abs().sum(0).argmin()
        matches.append(Cell(*q[best].tolist()))
    return matches
""",
    6: """
def background_loss(previous, original, mask):
    return ((previous - original) * (1 - mask.to(previous))).abs().sum()
""",
    7: """
def forward(layer, x):
    return layer.base(x) + F.linear(F.linear(x, layer.down), layer.scale * layer.up)
""",
    8: """
def noise_loss(unet, schedule, latent, timestep, noise, text):
    noisy = schedule.add_noise(latent, noise, timestep).to(text.dtype)
    predicted, _, _ = unet(noisy, timestep, text.expand(len(latent), -1, -1))
    return F.mse_loss(predicted.to(noise.dtype), noise)
""",
    9: """
def forward(layer, tokens, context, key_value=None):
    if key_value is None:
        key_value = layer.to_k(context), layer.to_v(context)
    mixed = attention(layer.to_q(tokens), key_value[0], key_value[1], layer.heads)
    return layer.to_out(mixed), key_value
""",
    10: """
def forward(layer, timestep, dtype):
    half = layer.channels // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angle = timestep.float()[:, None] * w
    waves = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1).to(dtype)
    return layer.linear_2(F.silu(layer.linear_1(waves)))
""",
    11: """
def forward(layer, hidden):
    if not layer.symmetric:
        hidden = F.pad(hidden, (0, 1, 0, 1))
    return layer.conv(hidden)
""",
    12: """
def gooddrag(denoiser, path, task, config):
    top = len(path) - 1
    latent, handles, idle = path[top], task.handles, 0
    supervise = supervisor(task, config)
    for level in range(top, max(top - config.drag_levels, 0), -1):
        observe = observer(denoiser, level, task, config)
        with torch.no_grad():
            origin = Origin(task.handles, observe(path[level]))
        last = yield from drag(latent, handles, task.targets, observe, supervise, config, origin)
        settled = all_arrived(last.handles, task.targets, config.tolerance)
        idle = idle + 1 if last.handles == handles and not settled else 0
        if idle == 3:
            return
        latent, handles = last.previous, last.handles
""",
}
SOLUTIONS = {number: IMPORTS + text for number, text in SOLUTIONS.items()}
