from dataclasses import dataclass
import torch
from torch import Tensor
from calidiff_nb.raters.cases import draw_like
@dataclass
class Trajectory:
    x0: Tensor
    states: list
    predictions: list
    timesteps: list
def timestep_grid(T, steps, start=None):
    top = T - 1 if start is None else start
    return torch.linspace(top, 0, steps).round().long() if steps > 1 else torch.tensor([top])
def ddim_step(x_t, x0_hat, t, t_prev, schedule, eta=0.0, generator=None):
    sh = (-1, *[1] * (x_t.ndim - 1))
    a, p = schedule.alpha_bar(t).reshape(sh), schedule.alpha_bar(t_prev).reshape(sh)
    eps = (x_t.double() - a.sqrt() * x0_hat) / (1 - a).sqrt()
    return (p.sqrt() * x0_hat + (1 - p).sqrt() * eps).to(x_t.dtype)
def sample(denoiser, schedule, shape=None, steps=5, start=None, start_t=None, step=ddim_step, generator=None, callback=None, keep=False):
    x = draw_like(torch.zeros(shape), generator) if start is None else start
    grid = timestep_grid(schedule.T, steps, start_t); states, preds = [x], []
    for i, t in enumerate(grid):
        tt = torch.full((len(x),), int(t)); tp = torch.full((len(x),), int(grid[i + 1]) if i + 1 < len(grid) else -1)
        x0 = denoiser(x, tt).clamp(-1, 1); x = step(x, x0, tt, tp, schedule)
        if keep: states.append(x); preds.append(x0)
    return Trajectory(x, states, preds, grid)
