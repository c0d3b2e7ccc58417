from dataclasses import dataclass
import math, torch
from torch import Tensor
@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    betas: Tensor
    @property
    def T(self): return len(self.betas)
    @property
    def alphas(self): return 1 - self.betas
    @property
    def alphas_cumprod(self): return self.alphas.cumprod(0)
    def alpha_bar(self, t):
        t = torch.as_tensor(t); tab = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod.cpu()]).to(t.device)
        return tab[t + 1]
def cosine_schedule(T=1000, s=0.008):
    f = lambda x: torch.cos((x + s) / (1 + s) * math.pi / 2) ** 2
    x = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    ab = f(x) / f(x[:1]); return NoiseSchedule((1 - ab[1:] / ab[:-1]).clamp(max=0.999))
