import torch
from torch import Tensor
from calidiff_nb.raters.cases import draw_like
def q_sample(x0, t, schedule, eps=None, generator=None):
    a = schedule.alpha_bar(t).to(x0).reshape(-1, *[1] * (x0.ndim - 1))
    eps = draw_like(x0, generator) if eps is None else eps
    return a.sqrt() * x0 + (1 - a).sqrt() * eps
