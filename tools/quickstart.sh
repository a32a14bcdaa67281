#!/usr/bin/env bash
# Installs what is missing, builds, trains an agent on MuJoCo's cartpole from pixels, and compares it with random actions.
#
#   tools/quickstart.sh [--seconds=600] [--seed=0] [--run_dir=FOLDER]
#
#   --seconds=N     time to train (default 600)
#   --seed=N        seed of the training run (default 0)
#   --run_dir=D     where the run is written (default runs/quickstart-DATE-TIME)
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=600
seed=0
run_dir="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for argument in "$@"; do
  case "$argument" in
    --seconds=*) seconds="${argument#*=}" ;;
    --seed=*) seed="${argument#*=}" ;;
    --run_dir=*) run_dir="${argument#*=}" ;;
    -h | --help) sed -n "2,8s/^# \{0,1\}//p" tools/quickstart.sh; exit 0 ;;
    *) echo "quickstart: unknown argument '$argument', see --help" >&2; exit 2 ;;
  esac
done

tools/setup.sh

ORRERY_PRESET=release tools/build.sh --target orrery
orrery=build/bin/orrery

echo "quickstart: training for $seconds seconds in $run_dir (Ctrl-C saves and ends)"
"$orrery" train --config=configs/quickstart.textproto --set="seed=$seed" --set="learning.max_seconds=$seconds" \
  --run_dir="$run_dir"

# Means of the returns of the same 5 episodes.
mean() {
  "$orrery" eval --config="$run_dir/config.textproto" --episodes=5 --seed=1000 --json "$@" |
    sed -n 's/.*"mean":\([-0-9.e+]*\).*/\1/p'
}
echo "quickstart: evaluating on 5 fixed seeds"
random=$(mean --algorithm=random)
agent=$(mean --snapshot="$run_dir/snapshots/latest.safetensors")

echo
echo "Learning curve: return of the collected episodes (with exploration noise), by environment steps"
awk -F, '
  NR > 1 && $2 != "evaluate" { n++; steps[n] = $7; value[n] = $6; if ($6 > top) top = $6 }
  END {
    rows = n < 20 ? n : 20
    for (r = 1; r <= rows; r++) {
      first = int((r - 1) * n / rows) + 1; last = int(r * n / rows); sum = 0
      for (i = first; i <= last; i++) sum += value[i]
      average = sum / (last - first + 1)
      bar = ""
      for (i = 0; i < (top > 0 ? 50 * average / top : 0); i++) bar = bar "#"
      printf "%9d %8.1f %s\n", steps[last], average, bar
    }
  }' "$run_dir/episodes.csv"
echo
awk -v r="$random" -v a="$agent" 'BEGIN {
  printf "Mean return of 5 episodes, without exploration noise: random actions %.1f, agent %.1f", r, a
  if (r > 0) printf " (%.1f times)", a / r
  printf "\n"
}'
echo "Film (above: what the agent saw, below: what it imagined): $run_dir/film.webp"
