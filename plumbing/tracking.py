"""
--track: the numbers of log.jsonl where you look at all your runs. log.jsonl stays the source.

    tensorboard     tensorboard --logdir runs
    wandb           as its own WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline, ... say
    trackio         trackio show
"""
import importlib
import uuid

from plumbing.files import replace_text


def start(tracker, out, done, config):
    """-> send({name: number}, step). tracker: the name of a package, as above.

    A run that goes on behind step `done` goes on in the same tracked run: tracked.txt in its folder
    has the name. Called when the data workers have been forked, because trackers start threads."""
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
