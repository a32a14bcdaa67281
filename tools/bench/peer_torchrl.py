#!/usr/bin/env python3
"""Times plans of TorchRL's CEMPlanner with PlaNet's latent model, for compare.py: one object per line, medians after a warm-up.

The same as in `orrery bench planner`: sizes (deterministic 200, stochastic 30, hidden 200, reward head 3 x 300, 6 actions),
horizon 12, 10 iterations, 1000 candidates, 100 elites, float32, all processors, a stochastic state drawn at every step.
Different: eager PyTorch under torch.no_grad; the reward is computed at every step, as TorchRL's environments do, instead of
once for all; the elites' standard deviation divides by n - 1 and has no floor.
"""
import argparse
import json

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase
from torchrl.modules import CEMPlanner

from timing import median_seconds

DETERMINISTIC, STOCHASTIC, HIDDEN, REWARD_HIDDEN, ACTIONS, MIN_STD = 200, 30, 200, 300, 6, 0.1


class Dynamics(nn.Module):
    """One step of the prior, and the reward of the state that it leads to."""

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(STOCHASTIC + ACTIONS, HIDDEN)
        self.cell = nn.GRUCell(HIDDEN, DETERMINISTIC)
        self.prior = nn.Sequential(nn.Linear(DETERMINISTIC, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * STOCHASTIC))
        layers, size = [], DETERMINISTIC + STOCHASTIC
        for _ in range(3):
            layers += [nn.Linear(size, REWARD_HIDDEN), nn.ReLU()]
            size = REWARD_HIDDEN
        self.reward = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, deter, stoch, action):
        batch = deter.shape[:-1]
        x = F.relu(self.input(torch.cat([stoch, action], -1)))
        deter = self.cell(x.flatten(0, -2), deter.flatten(0, -2)).unflatten(0, batch)
        mean, raw = self.prior(deter).chunk(2, -1)
        stoch = mean + (F.softplus(raw) + MIN_STD) * torch.randn_like(mean)
        return deter, stoch, self.reward(torch.cat([deter, stoch], -1))


class LatentEnv(ModelBasedEnvBase):
    def __init__(self):
        module = TensorDictModule(Dynamics(), in_keys=["deter", "stoch", "action"], out_keys=["deter", "stoch", "reward"])
        super().__init__(module)
        states = Composite(deter=Unbounded((DETERMINISTIC,)), stoch=Unbounded((STOCHASTIC,)))
        self.state_spec, self.observation_spec = states.clone(), states.clone()
        self.action_spec = Bounded(-1, 1, (ACTIONS,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict, **_):
        raise NotImplementedError("the planner begins from the states that it is given")


def state(agents):
    zeros = {"deter": torch.zeros(agents, DETERMINISTIC), "stoch": torch.zeros(agents, STOCHASTIC)}
    ends = {key: torch.zeros(agents, 1, dtype=torch.bool) for key in ("done", "terminated")}
    return TensorDict({**zeros, **ends}, [agents])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", default="1,8", help="agents planned for together")
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    planner = CEMPlanner(LatentEnv(), planning_horizon=12, optim_steps=10, num_candidates=args.candidates,
                         top_k=args.candidates // 10)
    with torch.no_grad():
        for agents in (int(word) for word in args.plans.split(",")):
            actions = []
            seconds = median_seconds(args, lambda: actions.append(planner(state(agents))["action"]))
            action = actions[-1]
            assert action.shape == (agents, ACTIONS) and action.isfinite().all(), action
            print(json.dumps({"what": "plan", "batch": agents, "seconds": seconds,
                              "torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
