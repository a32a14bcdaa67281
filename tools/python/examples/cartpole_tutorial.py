"""Tutorial: a world model and an agent for Gymnasium's CartPole-v1, from nothing to a film.

CartPole-v1 has two choices (push left, push right), and shows four numbers: place and speed of the cart, angle and speed of the
pole. Every step gives a reward of 1 until the pole has fallen (its angle is over 0.21, or the cart 2.4 from the middle), or 500
steps have passed. Random actions keep it up for some 20 steps.

    pip install 'tools/python[gymnasium]' 'gymnasium[classic-control]' pillow
    export ORRERY_BIN_DIR=$PWD/build/bin          # where tools/build.sh put the programs
    python tools/python/examples/cartpole_tutorial.py --episodes=30 --folder=runs/cartpole

On two busy cores this took five minutes: 30 episodes, 1,574 rows, 3,148 updates. The agent then kept the pole up for 495 of 500
steps on average over ten episodes (464 in the worst one), random actions for 24 in the same ones. That is one run: programs
that collect and learn at the same time never do quite the same twice.

The text between the steps says what happens; the same commands by hand are in docs/tutorial_gymnasium.md. With --pixels
the agent sees 64x64 pictures instead of the four numbers: that needs a GPU or patience.
"""

import argparse
import pathlib
import subprocess
import sys
import time

import gymnasium
import numpy as np

import orrery

# ---------------------------------------------------------------------------------------------------------------------
# 1. The experiment.
#
# Everything that the programs need to know is one text file. What is left out has a default (proto/orrery/config/v1 explains
# every field). Four things are this task's own:
# - Every step is rewarded alike, so what matters is how long the episode goes on. The model gets a head that predicts this
#   (`continue_head`): what follows an end does not count, neither for planners that search (cem, …) nor where an actor and a
#   value (`behavior`) are learned in imagination. The latter, used here, look further than a search's horizon.
# - The choice is discrete, and so the actor's gradient is REINFORCE.
# - An angle of 0.2 is all there is between upright and fallen. A reconstruction loss of squared errors hardly sees it at a
#   weight of 1, so `scale` (in make_experiment) gives the four numbers a weight of 100.
# - `time_limit` cuts episodes at 200 steps while data are collected, so that a good agent does not spend its time on what it
#   can do already. Cut is not ended: the model never learns that the pole falls there.
# ---------------------------------------------------------------------------------------------------------------------
EXPERIMENT = """
name: "cartpole_tutorial"
environment { task: "CartPole-v1" image_size: 64 time_limit: 200 }
model {
  deterministic_size: 64 stochastic_size: 16 hidden_size: 64 activation: ELU
  reward { layers: 2 hidden_size: 64 }
  continue_head { layers: 2 hidden_size: 64 }
  objective { free_nats: 1 free_nats_rule: AVERAGED }
  behavior {
    horizon: 15 discount: 0.98 gradient: REINFORCE entropy_scale: 0.03
    actor_layers: 2 actor_hidden_size: 64 value_layers: 2 value_hidden_size: 64
  }
}
planner { actor {} }
collection { seed_episodes: 10 exploration_noise: 0.1 environments: 2 lease_seconds: 30 }
evaluation { every_episodes: 10 }
replay { max_rows: 100000 chunk_rows: 10 limiter { updates_per_row: 2 tolerance: 200 } }
learning { schedule: CONCURRENT batch_size: 32 sequence_length: 10 snapshot_every_updates: 50
  actor_learning_rate: 0.0003 value_learning_rate: 0.001 }
"""


def make_experiment(pixels, episodes):
    """The experiment with the environment's part written out: the learner then needs no environment of its own. The
    command for this is `orrery-gym-actor --env=CartPole-v1 --modality=state --print-model`."""
    experiment = orrery.Experiment.parse(EXPERIMENT)
    experiment.set("learning.max_episodes", episodes)
    if pixels:
        shown = (orrery.TensorSpec("image", "uint8", (64, 64, 3)),)
    else:
        shown = (orrery.TensorSpec("state", "float32", (4,)),)
    spec = orrery.EnvironmentSpec(shown, orrery.ActionSpec(2, discrete=True))
    experiment.proto.model.MergeFrom(spec.to_model())
    if not pixels:
        experiment.set("model.modalities[0].vector.hidden_size", 64)
        experiment.set("model.modalities[0].vector.scale", 100)
    return experiment


# ---------------------------------------------------------------------------------------------------------------------
# 2. Training.
#
# `Services` starts three programs: replay hands out episodes and keeps what was seen, the learner fits the world model, the
# planner answers "what now?". Between them stands the actor, which plays: the only program that knows Gymnasium.
# ---------------------------------------------------------------------------------------------------------------------
def train(services, experiment, pixels, folder):
    actor = subprocess.Popen([
        sys.executable, "-m", "orrery.gym_actor", f"--config={services.folder / 'config.textproto'}",
        f"--modality={'image' if pixels else 'state'}", f"--replay={services.replay}", f"--planner={services.planner}",
        "--metrics_listen=127.0.0.1:0"])
    try:
        while actor.poll() is None:
            services.check()
            time.sleep(1)
    finally:
        if actor.poll() is None:
            actor.terminate()
            actor.wait()
    if actor.returncode != 0:
        raise SystemExit(f"the actor ended with exit code {actor.returncode}")
    with orrery.ReplayClient(services.replay, "cartpole_tutorial") as replay:
        stats = replay.stats()
        # The learner still makes the updates that belong to the last rows.
        while stats.updates_done < experiment.proto.replay.limiter.updates_per_row * stats.rows_appended:
            services.check()
            time.sleep(1)
            stats = replay.stats()
        print(f"{stats.episodes_finished} episodes, {stats.rows_appended} rows, {stats.updates_done} updates")
        snapshot = folder / "cartpole.safetensors"
        snapshot.write_bytes(replay.get_snapshot())
    return snapshot


# ---------------------------------------------------------------------------------------------------------------------
# 3. Playing.
#
# A snapshot is all that playing needs. `Policy` starts a planner with it and makes a function of it: observation in, action
# out. It remembers what it has seen since `reset`.
# ---------------------------------------------------------------------------------------------------------------------
def play(snapshot, pixels, episodes, film=None):
    """Returns of some episodes; the first one as a film."""
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    returns, frames = [], []
    with orrery.Policy(snapshot, action_space=env.action_space) as policy:
        for episode in range(episodes):
            observation, _ = env.reset(seed=1000 + episode)
            policy.reset()
            total, over = 0.0, False
            while not over:
                if film is not None and episode == 0:
                    frames.append(env.render())
                action = policy({"image": env.render()} if pixels else {"state": observation})
                observation, reward, terminated, truncated, _ = env.step(action)
                total += reward
                over = terminated or truncated
            returns.append(total)
    env.close()
    if film is not None:
        save_film(frames, film)
    return returns


def save_film(frames, path):
    from PIL import Image

    pictures = [Image.fromarray(frame).resize((300, 200)) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=20, loop=0)


def random_returns(episodes):
    """What uniformly random actions reach on the same episodes: the number to beat."""
    env = gymnasium.make("CartPole-v1")
    random = np.random.default_rng(0)
    returns = []
    for episode in range(episodes):
        env.reset(seed=1000 + episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(int(random.integers(2)))
            total += reward
            over = terminated or truncated
        returns.append(total)
    env.close()
    return returns


def show(returns):
    """For example "21.4 (9, 14, …)"."""
    return f"{np.mean(returns):.1f} ({', '.join(f'{one:.0f}' for one in returns)})"


# ---------------------------------------------------------------------------------------------------------------------
# 4. Looking inside.
#
# The parameters are ordinary arrays, and every episode that was played can be read back.
# ---------------------------------------------------------------------------------------------------------------------
def look_inside(snapshot):
    loaded = orrery.load_snapshot(snapshot)
    numbers = sum(array.size for array in loaded.arrays.values())
    print(f"snapshot {loaded.version}: {len(loaded.arrays)} tensors, {numbers} numbers; the largest:")
    for name, array in sorted(loaded.arrays.items(), key=lambda item: -item[1].size)[:3]:
        print(f"  {name} {list(array.shape)}")


def main():
    parser = argparse.ArgumentParser(description="CartPole-v1, from nothing to a film.")
    parser.add_argument("--episodes", type=int, default=30, help="episodes to collect (default: %(default)s)")
    parser.add_argument("--play", type=int, default=5, help="episodes to play afterwards (default: %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/cartpole"))
    parser.add_argument("--pixels", action="store_true", help="see pictures instead of four numbers")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    experiment = make_experiment(arguments.pixels, arguments.episodes)
    with orrery.Services(experiment, folder=arguments.folder) as services:
        snapshot = train(services, experiment, arguments.pixels, arguments.folder)
    look_inside(snapshot)
    film = arguments.folder / "cartpole.gif"
    agent = play(snapshot, arguments.pixels, arguments.play, film)
    random = random_returns(arguments.play)
    print(f"mean return (returns) of {arguments.play} episodes, of at most 500:")
    print(f"  random actions {show(random)}")
    print(f"  the agent      {show(agent)}")
    if np.mean(agent) < 2 * np.mean(random):
        print("this agent has learned little: more --episodes help")
    print(f"snapshot {snapshot}, film {film}, learning curve {arguments.folder / 'learner.csv'}")


if __name__ == "__main__":
    main()
