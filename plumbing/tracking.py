"""
--track NAME sends the numbers of each line of log.jsonl to a tracker, too.

    tensorboard     to look: tensorboard --logdir runs
    wandb           set up by its own variables: WANDB_PROJECT, WANDB_MODE=offline, ...
    trackio         to look: trackio show

A run that was killed repeats the steps after its last checkpoint, and sends them again.
TensorBoard drops the old ones; the others get the same numbers twice.
"""
import importlib
import uuid

from plumbing.files import replace_text


def start(tracker, out, done, config):
    """-> send({name: number}, step). tracker: the name of a package, as above.

    done: the run's step when it started. A resumed run continues the same tracked run: its name is
    in tracked.txt. Called after the data workers are forked, because trackers start threads."""
    mark = out / "tracked.txt"
    if done == 0 or not mark.exists():
        replace_text(mark, f"{out.name}-{uuid.uuid4().hex[:8]}")
    name = mark.read_text()

    if tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out / name, purge_step=done + 1, flush_secs=10)
        return lambda numbers, step: [writer.add_scalar(key, numbers[key], step) for key in numbers]
    module = importlib.import_module(tracker)
    if tracker == "wandb":
        module.init(id=name, name=name, resume="allow", dir=out, config=config)
    else:
        module.init("audio-reasoning", name=name, resume="allow", config=config)
    return module.log                   # both take (numbers, step)
