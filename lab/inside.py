"""
What happens inside: which layers of student and teacher are alike, whether W_i finds the right
token, who gets the gradient, and where hearing and reading part ways.

layers    Does the proportional map align what it should? Linear CKA between every student layer
          (hearing) and every teacher layer (reading), over the response's tokens; and, through W_i,
          how much of a student token's attention falls on its own teacher token. 1 / length would
          be chance. Before and after training.
features  Which features get the gradient of L_layer, with each divergence of losses.py, and with a
          "massive" feature planted into both models?
kl        CORD's Figure 3: where along a rollout, and on which tokens, is D_t large?

    python -m lab.inside layers --model runs/source_layer --data test.jsonl
    python -m lab.inside features --model mini/student --teacher mini/teacher --data test.jsonl
    python -m lab.inside kl --model runs/cord --data test.jsonl
"""
import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import data
import evaluate
import layer_map
import losses
import models
import rollout
from plumbing import hearing
from plumbing.files import make_folder, newest_checkpoint, read_json, write_json, writing

IMPROBABLE = 1e-4           # what the teacher gives less than this, it finds improbable
MOST_TOKENS = 2000          # CKA compares every two tokens: 32 MB a layer
PLANTED = 200.0             # arXiv 2402.17762: features hundreds of times the median


# -------------------------------------------------------------------------------------------------
# 1. Both models on the same responses

@torch.no_grad()
def states(student, processor, teacher, tokenizer, examples, *, batch_size=8):
    """Every layer at every response token -> {"student": {layer: [tokens, hidden]}, "teacher": the
    same, "rows": tokens of each response, "jsd", "stray": per token, of the next-token
    distributions over the shared tokens [tokens]}, float32 on the CPU.

    Memory: tokens x (layers x hidden of both) x 4 bytes, 1 GB for a thousand tokens of a 7B and an
    8B model; so no batch is begun after MOST_TOKENS."""
    student_ids, teacher_ids, _ = data.shared_vocabulary(processor.tokenizer, tokenizer)
    vocab = student.config.text_config.vocab_size
    to_teacher = data.token_map(student_ids, teacher_ids, vocab)
    taps = {}
    found = {}
    for side, model in (("student", student), ("teacher", teacher)):
        layers = models.decoder(model).layers
        taps[side] = layer_map.Tap(layers, {"response": range(1, len(layers) + 1)})
        found[side] = defaultdict(list)

    rows = []
    jsd = []
    stray = []
    for start in range(0, len(examples), batch_size):
        if sum(rows) >= MOST_TOKENS:
            break
        batch = data.collate(examples[start:start + batch_size], processor, tokenizer,
                             student_to_teacher=to_teacher).to(student.device)
        for e in batch.examples:
            rows.append(len(data.encode_response(processor.tokenizer, data.response_text(e))))

        logits = []
        for side, model, forward, view, ids in (
            ("student", student, models.hear, batch.audio, student_ids),
            ("teacher", teacher, models.read, batch.text, teacher_ids),
        ):
            with taps[side].at(response=view.predict_positions) as hidden:
                last = forward(model, **view.inputs)
            last = last.flatten(0, 1)[view.predict_positions]       # [tokens, hidden]
            z = last @ models.head_weight(model).T                  # [tokens, vocab]
            logits.append(z.index_select(-1, ids.to(z.device)))     # [tokens, shared]
            for layer, tensor in hidden["response"].items():
                found[side][layer].append(tensor.float().cpu())
        jsd.append(losses.token_divergence(*logits).cpu())
        q, p = (z.float().softmax(-1) for z in logits)
        stray.append((q * (p < IMPROBABLE)).sum(-1).cpu())

    for side, layers in found.items():
        found[side] = {layer: torch.cat(parts) for layer, parts in layers.items()}
    return {**found, "rows": rows, "jsd": torch.cat(jsd), "stray": torch.cat(stray)}


def standardise(hidden):
    """[tokens, width] -> each feature with mean 0 and deviation 1, or a massive feature would be
    all that CKA sees."""
    mean, std = layer_map.feature_statistics(hidden)
    return (hidden - mean) / std


# -------------------------------------------------------------------------------------------------
# 2. Alike: linear CKA

def cka(ones, others):
    """Lists of S and T matrices [tokens, width], widths free -> [S, T]: linear centred kernel
    alignment, unbiased (arXiv 1905.00414, 2010.15327): 1 for a rotation of the same, 0 on average
    for the unrelated. The plain estimate drifts towards 1 as soon as there are more features than
    tokens. ValueError for fewer than four tokens.

        K = X X', diagonal zero;  CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))
        HSIC(K, L) = [ sum K*L + (sum K)(sum L) / ((n-1)(n-2)) - 2 / (n-2) sum (K 1)*(L 1) ]
                     / (n (n-3)), whose last factor CKA cancels
    """
    n = len(ones[0])
    if n < 4:
        raise ValueError(f"{n} tokens are too few to compare layers on: give more examples")

    def hsic(k, l):
        sums = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2))
        return sums - 2 / (n - 2) * (k.sum(0) * l.sum(0)).sum()

    def kernel(hidden):
        k = hidden.double() @ hidden.double().T                     # [tokens, tokens]
        k.fill_diagonal_(0)
        return k / hsic(k, k).sqrt()                                # HSIC is linear in both

    kernels = [kernel(x) for x in ones]
    columns = []
    for hidden in others:                                           # one teacher kernel at a time
        l = kernel(hidden)
        columns.append(torch.stack([hsic(k, l) for k in kernels]))
    return torch.stack(columns, 1)


# -------------------------------------------------------------------------------------------------
# 3. Its own token: attention through W_i

def own_attention(projected, target, rows):
    """Student states in the teacher's space and teacher states, both standardised [tokens, width];
    rows: tokens of each response.

    -> (share, first, chance): softmax(s t' / sqrt(width)) over the teacher tokens of the same
    response, its mean weight on the paired token; the share of tokens that attend to their own
    most; and the mean of 1 / length, what uniform attention would give."""
    shares = []
    firsts = []
    for s, t in zip(projected.split(rows), target.split(rows)):
        attention = (s @ t.T / t.shape[1] ** 0.5).softmax(-1)       # [tokens, tokens] of it
        shares.append(attention.diagonal())
        firsts.append(attention.argmax(-1) == torch.arange(len(s)))
    share, first = (torch.cat(x).float().mean().item() for x in (shares, firsts))
    return share, first, len(rows) / sum(rows)


def fit(pairs, found):
    """Projections fitted by least squares on states' dict, as at the start of training."""
    widths = [found[side][1].shape[1] for side in ("student", "teacher")]
    projections = layer_map.Projections(pairs, *widths)
    for i, (s, t) in enumerate(pairs):
        projections.fit(i, found["student"][s], found["teacher"][t])
    return projections


@torch.no_grad()
def trained(path, pairs, fitted):
    """A run's saved projections for the pairs that it distilled; for the others, the `fitted`."""
    saved = load_file(path)
    for row, pair in enumerate(saved["layers"].tolist()):
        i = pairs.index(tuple(pair))
        fitted.weights[i].copy_(saved[f"weights.{row}"])
        fitted.mean[i] = saved["mean"][row]
        fitted.std[i] = saved["std"][row]
    return fitted


@torch.no_grad()
def layers_report(found, pairs, projections):
    """-> {"cka": [S][T], "attention": one row per pair, "vocabulary": ...}, JSON-ready."""
    sides = []
    for side in ("student", "teacher"):
        sides.append([standardise(found[side][layer]) for layer in sorted(found[side])])
    attention = []
    for i, (s, t) in enumerate(pairs):
        mean = projections.mean[i]
        std = projections.std[i]
        projected = (projections(i, found["student"][s]) - mean) / std
        target = (found["teacher"][t] - mean) / std
        share, first, chance = own_attention(projected, target, found["rows"])
        row = {"student": s, "teacher": t, "own": share, "own_is_first": first, "chance": chance}
        attention.append(row)
    table = [[round(x, 4) for x in row] for row in cka(*sides).tolist()]
    vocabulary = {name: found[name].mean().item() for name in ("jsd", "stray")}
    return {"cka": table, "attention": attention, "vocabulary": vocabulary}


def layers_lines(report):
    """What `before` and `after` say of each pair, as text."""
    before = report["before"]
    after = report["after"]
    lines = ["student <- teacher     CKA before -> after     attention on the own token     own "
             "token first"]
    for old, new in zip(before["attention"], after["attention"]):
        s = new["student"]
        t = new["teacher"]
        alike = f"{before['cka'][s - 1][t - 1]:.3f} -> {after['cka'][s - 1][t - 1]:.3f}"
        first = f"{old['own_is_first']:.1%} -> {new['own_is_first']:.1%}"
        lines.append(f"{s:7} <- {t:<7}        {alike}               "
                     f"{old['own']:.3f} -> {new['own']:.3f}            {first}")
    lines.append(f"(uniform attention would give {after['attention'][0]['chance']:.3f})")
    for when in ("before", "after"):
        found = report[when]["vocabulary"]
        lines.append(f"{when}: JSD {found['jsd']:.4f}, mass on tokens that the teacher gives less "
                     f"than {IMPROBABLE:g}: {found['stray']:.4f}")
    return lines


def plot_layers(before, after, pairs):
    """-> Figure: CKA before and after as heat maps with the map drawn on, and the attention on the
    own token for each pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    *maps, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    at = torch.arange(len(pairs))
    everything = torch.tensor([before["cka"], after["cka"]])
    for axis, name, report, shift, colour in (
        (maps[0], "before", before, -0.2, "#b8c4d6"),
        (maps[1], "after", after, 0.2, "#2f5d9b"),
    ):
        table = torch.tensor(report["cka"])                         # [student, teacher layers]
        depth, teacher_depth = table.shape
        image = axis.imshow(table, origin="lower", cmap="viridis", aspect="auto",
                            vmin=everything.min(), vmax=everything.max(),
                            extent=(0.5, teacher_depth + 0.5, 0.5, depth + 0.5))
        axis.plot([t for _, t in pairs], [s for s, _ in pairs], "-o", color="white", markersize=6,
                  markeredgecolor="black", label="the map")
        best = (table.argmax(1) + 1).tolist()
        axis.plot(best, range(1, depth + 1), "x", color="#e4572e", markersize=8,
                  markeredgewidth=2, label="most alike")
        axis.set(xlabel="teacher layer (reads)", ylabel="student layer (hears)")
        axis.set(title=f"CKA {name}")
        axis.set_xticks(range(1, teacher_depth + 1), minor=True)
        own = [row["own"] for row in report["attention"]]
        bars.bar(at + shift, own, 0.38, color=colour, label=name)
    maps[0].legend(loc="upper left", fontsize=8)
    figure.colorbar(image, ax=maps[1])

    chance = after["attention"][0]["chance"]
    bars.axhline(chance, color="#555555", linestyle="--", linewidth=1, label="chance")
    labels = [f"{s}\u2190{t}" for s, t in pairs]
    bars.set_xticks(at, labels, rotation=60 if len(pairs) > 12 else 0)
    bars.set(xlabel="pair, student \u2190 teacher", ylabel="attention on the own token",
             ylim=(0, 1), title="through W: does it find its token?")
    bars.legend(frameon=False)
    bars.spines[["top", "right"]].set_visible(False)
    return figure


# -------------------------------------------------------------------------------------------------
# 4. Who gets the gradient

def gradient_shares(loss, student, teacher, **statistics):
    """|d loss / d feature| x the feature's deviation, summed over tokens, as shares of the whole ->
    [width]. One deviation is the unit in which features can be compared."""
    student = student.detach().clone().requires_grad_()
    loss(student, teacher, **statistics).backward()
    pull = student.grad.abs().sum(0) * layer_map.feature_statistics(teacher)[1]
    return pull / pull.sum()


def features_report(found, pairs, projections):
    """For each divergence, on the models' own features and with feature 0 of both sides multiplied
    by PLANTED: {"natural" or "planted": {divergence: {"largest": share of the gradient on the
    largest feature, "half": share of the features that holds half of the gradient}}}, means over
    the pairs; "curves": the sorted shares, cumulative."""
    scale = torch.ones(projections.mean.shape[1])
    report = {"curves": {}}
    for kind, factor in (("natural", 1.0), ("planted", PLANTED)):
        scale[0] = factor
        rows = defaultdict(list)
        for i, (s, t) in enumerate(pairs):
            student = projections(i, found["student"][s]).detach() * scale
            teacher = found["teacher"][t] * scale
            mean, std = layer_map.feature_statistics(teacher)
            for name in ("jsd", "mse", "cosine"):
                loss = losses.HIDDEN[name]
                raw = gradient_shares(loss, student, teacher)
                standardised = gradient_shares(loss, student, teacher, mean=mean, std=std)
                rows[f"{name}, raw"].append(raw)
                rows[f"{name}, standardised"].append(standardised)

        report[kind] = {}
        report["curves"][kind] = {}
        for name, shares in rows.items():
            ranked = torch.stack(shares).sort(-1, descending=True).values       # [pairs, width]
            share = ranked.mean(0)
            cumulative = share.cumsum(0)
            half = ((cumulative < 0.5).sum().item() + 1) / len(share)
            report[kind][name] = {"largest": share[0].item(), "half": half}
            report["curves"][kind][name] = [round(x, 4) for x in cumulative.tolist()]
    return report


def features_lines(report):
    lines = [f"{'':24}{'largest feature holds':>24}{'half of it lies on':>24}"]
    for kind in ("natural", "planted"):
        for name, row in report[kind].items():
            lines.append(f"{kind:10}{name:22}{row['largest']:10.1%} of the gradient"
                         f"{row['half']:10.1%} of the features")
    return lines


def plot_features(report):
    """-> Figure: cumulative share of the gradient over the features, largest first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {"jsd": "#2f5d9b", "mse": "#d98c3f", "cosine": "#5fa55a"}
    for axis, kind, title in (
        (axes[0], "natural", "the models' own features"),
        (axes[1], "planted", f"one feature {PLANTED:.0f} times larger"),
    ):
        for name, shares in report["curves"][kind].items():
            divergence, how = name.split(", ")
            style = "-" if how == "standardised" else ":"
            at = np.arange(1, len(shares) + 1)
            axis.plot(at, shares, color=colours[divergence], linestyle=style, label=name)
        axis.plot(at, at / len(at), color="#999999", linewidth=1, label="all features alike")
        axis.set(xlabel="features, largest share first", title=title)
        axis.set(xscale="log", ylim=(0, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="share of L_layer's gradient, cumulative")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    return figure


# -------------------------------------------------------------------------------------------------
# 5. CORD: where do hearing and reading part ways?

@torch.no_grad()
def divergences(student, processor, teacher, examples, *, batch_size=32, max_new_tokens=200):
    """One rollout at temperature 1 to each example's audio -> [(its token ids, D_t of each against
    what `teacher` says reading the transcript)]."""
    tokenizer = processor.tokenizer
    banned = torch.tensor(rollout.banned_ids(student, tokenizer), device=student.device)
    pairs = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start:start + batch_size]
        prompts = data.encode_prompts(chunk, processor, tokenizer, words="transcript")
        rollouts = rollout.roll_out(student, processor, prompts, [rollout.Kind(1.0, kl=True)],
                                    key="0 kl", max_new_tokens=max_new_tokens)
        answers = [r.ids for r in rollouts]
        rows = range(len(answers))
        audio = data.audio_view(prompts, rows, answers, processor)
        text = data.pack(prompts.text, rows, answers, tokenizer)

        logits = []
        for forward, model, view in ((models.hear, student, audio), (models.read, teacher, text)):
            view = view.to(model.device)
            last = forward(model, **view.inputs)                    # [rollouts, seq, hidden]
            last = last.flatten(0, 1)[view.predict_positions]       # [tokens, hidden]
            z = losses.head_logits(last, models.head_weight(model))
            logits.append(z.index_fill(-1, banned, losses.FLOOR))
        kl = losses.token_divergence(*logits, beta=1)               # D_t [tokens]
        kl = kl.split([len(ids) for ids in answers])
        pairs += [(ids, row.tolist()) for ids, row in zip(answers, kl)]
    return pairs


def kl_report(pairs, tokenizer, *, bins=20, least=5):
    """What divergences() found -> percentiles, mean by position with its correlation, the share of
    all D_t that the largest tenth holds, and the tokens with the largest mean D_t (said at least
    `least` times)."""
    kl = np.concatenate([row for _, row in pairs])
    place = np.concatenate([np.arange(len(row)) / max(len(row) - 1, 1) for _, row in pairs])
    slot = np.minimum((place * bins).astype(int), bins - 1)         # place: 0 first token, 1 last
    edges = np.concatenate([[0], np.logspace(-6, 2, 33)])
    counts, _ = np.histogram(kl.clip(0, edges[-1]), edges)

    of_token = defaultdict(list)
    for ids, row in pairs:
        for token, d in zip(ids, row):
            of_token[token].append(d)
    by_token = []
    for token, values in of_token.items():
        if len(values) >= least:
            word = tokenizer.decode([token])
            by_token.append({"token": word, "mean": np.mean(values), "count": len(values)})
    by_token.sort(key=lambda row: row["mean"], reverse=True)

    largest = np.sort(kl)[-math.ceil(len(kl) / 10):]
    by_position = [kl[slot == b] for b in range(bins)]
    return {
        "rollouts": len(pairs),
        "tokens": len(kl),
        "mean": kl.mean(),
        "percentiles": {str(p): np.percentile(kl, p) for p in (50, 80, 90, 95, 99)},
        "tenth": largest.sum() / kl.sum(),
        "by_position": [part.mean() if part.size else None for part in by_position],
        "correlation": np.corrcoef(kl, place)[0, 1],
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "by_token": by_token,
    }


def word_of(token):
    return token.strip() or repr(token)


def kl_lines(reports):
    """{"before", "after"} -> lines."""
    lines = []
    for when, r in reports.items():
        p = r["percentiles"]
        lines.append(f"{when}: D_t mean {r['mean']:.3f}, half below {p['50']:.2g}, 80 % below "
                     f"{p['80']:.2g}, 95 % below {p['95']:.2g}; the largest tenth holds "
                     f"{100 * r['tenth']:.0f} % of it; correlation with position "
                     f"{r['correlation']:+.3f} ({r['rollouts']} rollouts)")
        words = [f"{word_of(row['token'])} {row['mean']:.2f}" for row in r["by_token"][:10]]
        lines.append("    largest on: " + ", ".join(words))
    return lines


def plot_kl(reports):
    """-> Figure: how D_t is spread, where along the rollout it lies, and on which tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = axes = figure.subplots(1, 3)
    first = [row["token"] for row in reports["before"]["by_token"][:15]]
    for (when, r), colour, thick in zip(reports.items(), ("#b8c4d6", "#2f5d9b"), (0.8, 0.4)):
        edges = np.array(r["histogram"]["edges"])
        counts = np.array(r["histogram"]["counts"])
        edges[0] = edges[1] / 2
        left.stairs(100 * counts / counts.sum(), edges, fill=True, alpha=0.6, color=colour,
                    label=f"{when}: mean {r['mean']:.3f}")
        most = r["percentiles"]["80"]
        left.axvline(most, color=colour, linestyle="--", linewidth=1.2,
                     label=f"80 % below {most:.2g}")
        values = np.array(r["by_position"], dtype=float)            # None becomes nan
        at = (np.arange(len(values)) + 0.5) / len(values)
        middle.plot(at, values, "-o", markersize=3, color=colour,
                    label=f"{when}: correlation {r['correlation']:+.2f}")
        means = {row["token"]: row["mean"] for row in r["by_token"]}
        widths = [means.get(token, 0) for token in first]
        right.barh(range(len(first)), widths, thick, color=colour, label=when)

    left.set(xscale="log", xlabel="D_t (nats)", ylabel="tokens (%)")
    left.set_title("most tokens agree, few do not")
    middle.set(xlabel="position in the rollout (0 first token, 1 last)", ylabel="mean D_t (nats)")
    middle.set(title="where", ylim=(0, None))
    right.set_yticks(range(len(first)), list(map(word_of, first)))
    right.invert_yaxis()
    right.set(xlabel="mean D_t (nats)", title="on which tokens")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    return figure


# -------------------------------------------------------------------------------------------------
# 6. The commands

def settings_of(model):
    """The flags of the run that a checkpoint belongs to; none for another model."""
    if not (model / "checkpoint.json").exists():
        return {}
    return read_json(model.parent / "config.json") or {}


def loaded(load, name):
    """A model and its processor or tokenizer, on the GPU in bfloat16 if there is one."""
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    model, reader = load(str(name), dtype=dtype)
    return model.to(device), reader


def save(out, name, report, figure):
    write_json(out / f"{name}.json", report)
    with writing(out / f"{name}.png"):
        figure.savefig(out / f"{name}.png", dpi=120)
    print(f"{out}: {name}.json, {name}.png")


def run_layers(args, out):
    """layers and features: JSON, a PNG and a few lines. A checkpoint's run names its teacher and
    the student that it started from. Of 80 examples every second fits W_i, the others are looked
    at."""
    model = Path(args.model)
    settings = settings_of(model)
    teacher_name = args.teacher or settings.get("teacher")
    if not teacher_name:
        raise data.DataError(f"{model}: is no checkpoint of a run, so nobody knows its teacher; "
                             "give --teacher")
    examples = data.read_manifest(args.data)
    examples = [e for e in examples if e.task != evaluate.SER_TASK]
    examples = [e for e in examples if e.reasoning and e.description]
    most = min(len(examples), 80)
    if most < 4:
        raise data.DataError(f"{args.data}: has {most} examples with reasoning and description; at "
                             "least 4 are needed")
    # spread over the file, so that every task is there however it is sorted
    examples = [examples[i * len(examples) // most] for i in range(most)]
    teacher, tokenizer = loaded(models.load_text_model, teacher_name)
    hearing.check_teacher(teacher)

    def look(name):
        """-> states of the examples looked at, the whole map, its fitted projections."""
        hears = loaded(models.load_audio_model, name)
        fitting = states(*hears, teacher, tokenizer, examples[::2])
        seen = states(*hears, teacher, tokenizer, examples[1::2])
        pairs = layer_map.pairs(len(seen["student"]), len(seen["teacher"]))
        return seen, pairs, fit(pairs, fitting)

    if args.task == "features":
        report = features_report(*look(model))
        print(*features_lines(report), sep="\n")
        save(out, "features", report, plot_features(report))
        return
    before = layers_report(*look(settings.get("student", model)))
    seen, pairs, projections = look(model)
    saved = model / "projections.safetensors"
    if saved.exists():
        projections = trained(saved, pairs, projections)
    after = layers_report(seen, pairs, projections)
    report = {"pairs": pairs, "before": before, "after": after}
    print(*layers_lines(report), sep="\n")
    save(out, "layers", report, plot_layers(before, after, pairs))


def run_kl(args, out):
    """The spread of D_t over the rollouts of the first 200 examples. The student that a run started
    from is the teacher, before and after training."""
    model = Path(args.model)
    settings = settings_of(model)
    examples = evaluate.spoken(data.read_manifest(args.data))[:200]
    if not examples:
        raise data.DataError(f"{args.data}: has no example with a transcript, so no text view can "
                             "be compared; add transcripts")
    teacher, processor = loaded(models.load_audio_model, settings.get("student", model))
    students = {"before": teacher}
    if settings:
        students["after"], _ = loaded(models.load_audio_model, model)
    reports = {}
    for when, student in students.items():
        pairs = divergences(student, processor, teacher, examples, batch_size=args.batch_size,
                            max_new_tokens=args.max_new_tokens)
        reports[when] = kl_report(pairs, processor.tokenizer)
    print(*kl_lines(reports), sep="\n")
    save(out, "kl", reports, plot_kl(reports))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=["layers", "features", "kl"])
    add("--model", metavar="DIR", required=True, help="an audio language model, or a run's folder")
    add("--data", metavar="FILE", required=True, help="a manifest (JSONL; see data.py)")
    add("--teacher", metavar="DIR",
        help="layers, features: the text LLM; default: the one that the run of --model names")
    add("--out", default="runs/evaluate", help="folder (default %(default)s)")
    add("--batch-size", type=int, default=16, help="kl: rollouts at once")
    add("--max-new-tokens", type=int, default=200, help="kl: tokens of a rollout (paper B: 200)")
    args = parser.parse_args(argv)
    out = make_folder(args.out)
    args.model = newest_checkpoint(args.model)
    run = run_kl if args.task == "kl" else run_layers
    run(args, out)


if __name__ == "__main__":
    main()
