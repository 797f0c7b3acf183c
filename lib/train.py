"""Train a preset's model: one process, or several, which share every step, and stop together. More: `--help`."""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("train").parse_args()

import contextlib
import sys
from pathlib import Path

import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from lib.data.latents import LatentPairs
from lib.evaluation.baselines import pairs_to_measure
from lib.evaluation.progress import SPLIT, MeritOverTime
from lib.pipeline import parse_overrides
from lib.presets import load_preset
from lib.project import ROOT, Project, open_project
from lib.training.callbacks import DemoClips
from lib.training.fusion_learner import train
from lib.training.run import LOCK, Run
from lib.training.trainer import Callback, join_processes
from lib.util.configs import check
from lib.util.errors import UserError, exit_on_user_error
from lib.util.files import only_one


def train_project(
    project: Project, *, resume=False, num_processes: int = 1, callbacks: tuple[Callback, ...] = (), progress=True
) -> Run:
    """Train the project's model, with demo clips. In a notebook, `num_processes` above 1 starts
    one for each GPU, without `callbacks`: another process cannot reach the notebook's page. `progress`: a bar."""
    preset = project.preset

    def start(*callbacks: Callback) -> Run:
        if num_processes > 1:
            torch.set_num_threads(1)  # OpenMP's threads do not follow into a fork: a step would wait for them forever
        model, clips = preset.model, DemoClips(project.codec, project.manifest, preset.listening.every)
        what = (project.out_dir, project.index, project.codec, model.cascade, preset.train, model.masking)
        return train(*what, resume=resume, callbacks=(clips, *callbacks), progress=progress)

    if num_processes == 1:
        return start(*callbacks)
    if torch.cuda.is_initialized():
        raise UserError(f"num_processes={num_processes}: this kernel has used a GPU already; restart it, train first")
    # Private: the launcher refuses a kernel with a state, such as an earlier training's, and no public call clears it.
    AcceleratorState._reset_state(reset_partial_state=True)
    notebook_launcher(start, num_processes=num_processes, use_port=str(get_free_port()))
    return Run.open(project.out_dir)


def pairs_to_follow(project: Project, count: int) -> list[tuple[Tensor, Tensor]]:
    """Held-out latents `[D, T]` of at most `count` pairs of two songs."""
    pairs = LatentPairs(project.index, "val")
    return [pairs[i] for i in pairs_to_measure(project.manifest, pairs, count)]


def main() -> None:
    options = parser_of("train").parse_args()
    with exit_on_user_error(), contextlib.ExitStack() as held:
        preset = load_preset(options.preset, parse_overrides(options.set, options.codec))
        preset.train.loss.find_own()  # before music is read
        processes = join_processes()
        data, out = (Path(path).resolve() if path else "" for path in (options.data, options.out))
        if processes.is_main_process:  # before anything is written there
            held.enter_context(only_one((out or ROOT / "outputs" / preset.name) / LOCK))
        project = open_project(preset, data, out, processes, resume=options.resume)
        if processes.is_main_process:
            print(*project.in_words(), sep="\n", file=sys.stderr, flush=True)
        check(options.follow >= 0, "--follow", options.follow, "0 or more")
        followed = options.follow and pairs_to_follow(project, options.follow)
        callbacks = (MeritOverTime(followed, project.codec),) if followed else ()
        run = train_project(project, resume=options.resume, callbacks=callbacks)
        if processes.is_main_process:
            for row in run.metrics(SPLIT)[-1:]:
                print(f"merit: {row['merit']:.2f} on {row['pairs']} pairs after {row['seconds']:.0f} s of training")
            print(f"run: {run.path}")


if __name__ == "__main__":
    main()
