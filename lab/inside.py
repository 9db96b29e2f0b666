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
from plumbing.files import make_folder, write_json, writing
from plumbing.predictions import read_json

IMPROBABLE = 1e-4           # what the teacher gives less than this, it finds improbable
MOST_TOKENS = 2000          # CKA compares every two tokens: 32 MB a layer
PLANTED = 200.0             # arXiv 2402.17762 finds features hundreds of times larger than the median


# ---------------------------------------------------------------------------------------------------------------------------------
# 1. Both models on the same responses

@torch.no_grad()
def states(student, processor, teacher, tokenizer, examples, *, batch_size=8):
    """Every layer at every response token -> {"student": {layer: [tokens, hidden]}, "teacher": the same, "rows": tokens of each response,
    "jsd", "stray": per token, of the next-token distributions over the shared tokens [tokens]}, float32 on the CPU.

    Memory: tokens x (layers x hidden of both) x 4 bytes, 1 GB for a thousand tokens of a 7B and an 8B model; so no batch is begun after
    MOST_TOKENS."""
    student_ids, teacher_ids, _ = data.shared_vocabulary(processor.tokenizer, tokenizer)
    to_teacher = data.token_map(student_ids, teacher_ids, student.config.text_config.vocab_size)
    sides = {"student": (student, models.decoder(student).layers), "teacher": (teacher, models.decoder(teacher).layers)}
    taps = {name: layer_map.Tap(layers, {"response": range(1, len(layers) + 1)}) for name, (_, layers) in sides.items()}
    kept = {name: {layer: [] for layer in range(1, len(layers) + 1)} for name, (_, layers) in sides.items()}
    rows, divergence, stray = [], [], []
    for start in range(0, len(examples), batch_size):
        if sum(rows) >= MOST_TOKENS:
            break
        batch = data.collate(examples[start:start + batch_size], processor, tokenizer, student_to_teacher=to_teacher).to(student.device)
        rows += [len(data.encode_response(processor.tokenizer, data.response_text(e))) for e in batch.examples]
        logits = []
        for name, view, ids in (("student", batch.audio, student_ids), ("teacher", batch.text, teacher_ids)):
            run = {"student": models.hear, "teacher": models.read}[name]
            with taps[name].at(response=view.predict_positions) as hidden:
                last = run(sides[name][0], **view.inputs)
            said = last.flatten(0, 1)[view.predict_positions] @ models.head_weight(sides[name][0]).T               # [tokens, vocab]
            logits.append(said.index_select(-1, ids.to(said.device)))                        # [tokens, shared]
            for layer, tensor in hidden["response"].items():
                kept[name][layer].append(tensor.float().cpu())
        divergence.append(losses.token_divergence(*logits).cpu())
        q, p = (z.float().softmax(-1) for z in logits)
        stray.append((q * (p < IMPROBABLE)).sum(-1).cpu())
    return {**{name: {layer: torch.cat(parts) for layer, parts in layers.items()} for name, layers in kept.items()},
            "rows": rows, "jsd": torch.cat(divergence), "stray": torch.cat(stray)}


def standardise(hidden):
    """[tokens, width] -> each feature with mean 0 and deviation 1, or a massive feature would be all that CKA sees."""
    mean, std = layer_map.feature_statistics(hidden)
    return (hidden - mean) / std


# ---------------------------------------------------------------------------------------------------------------------------------
# 2. Alike: linear CKA

def cka(ones, others):
    """Lists of S and T matrices [tokens, width], widths free -> [S, T]: linear centred kernel alignment, unbiased (arXiv 1905.00414,
    2010.15327): 1 for a rotation of the same, 0 on average for what has nothing to do with each other. The plain estimate would drift
    towards 1 as soon as there are more features than tokens. ValueError for fewer than four tokens.

        HSIC(K, L) = [ sum K*L + (sum K)(sum L) / ((n-1)(n-2)) - 2 / (n-2) sum (K 1)*(L 1) ] / (n (n-3)),   K = X X', diagonal zero
    """
    n = len(ones[0])
    if n < 4:
        raise ValueError(f"{n} tokens are too few to compare layers on: give more examples")

    def kernel(hidden):
        k = hidden.double() @ hidden.double().T                     # [tokens, tokens]
        return k.fill_diagonal_(0)

    def hsic(k, l):
        return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * l.sum(0)).sum()

    first = [kernel(x) for x in ones]
    table = torch.zeros(len(ones), len(others), dtype=torch.float64)
    own = [hsic(k, k) for k in first]
    for t, hidden in enumerate(others):                             # one teacher kernel at a time
        l = kernel(hidden)
        norm = hsic(l, l)
        table[:, t] = torch.stack([hsic(k, l) / (self_ * norm).clamp(min=1e-300).sqrt() for k, self_ in zip(first, own)])
    return table


# ---------------------------------------------------------------------------------------------------------------------------------
# 3. Its own token: attention through W_i

def own_attention(projected, target, rows):
    """Student states in the teacher's space and teacher states, both standardised [tokens, width]; rows: tokens of each response.

    -> (share, first, chance): softmax(s t' / sqrt(width)) over the teacher tokens of the same response, its mean weight on the paired
    token; the share of tokens that attend to their own most; and 1 / length, what uniform attention would give."""
    shares, firsts, chances = [], [], []
    for s, t in zip(projected.split(rows), target.split(rows)):
        attention = (s @ t.T / t.shape[1] ** 0.5).softmax(-1)       # [tokens of this response, the same]
        shares.append(attention.diagonal())
        firsts.append(attention.argmax(-1) == torch.arange(len(s)))
        chances.append(torch.full((len(s),), 1 / len(s)))
    return [torch.cat(x).float().mean().item() for x in (shares, firsts, chances)]


def fit(pairs, known):
    """Projections fitted by least squares on `known` (states' dict), as at the start of training."""
    widths = [known[side][1].shape[1] for side in ("student", "teacher")]
    projections = layer_map.Projections(pairs, *widths)
    for i, (s, t) in enumerate(pairs):
        projections.fit(i, known["student"][s], known["teacher"][t])
    return projections


def trained(path, pairs, fitted):
    """A run's saved projections for the pairs that it distilled; for the others, what was `fitted` for them."""
    saved = load_file(path)
    rows = {tuple(pair): i for i, pair in enumerate(saved["layers"].tolist())}
    for i, pair in enumerate(pairs):
        if pair in rows:
            with torch.no_grad():
                fitted.weights[i].copy_(saved[f"weights.{rows[pair]}"])
                fitted.mean[i], fitted.std[i] = saved["mean"][rows[pair]], saved["std"][rows[pair]]
    return fitted


@torch.no_grad()
def layers_report(found, pairs, projections):
    """states' dict of some examples, the map, W_i -> {"cka": [S][T], "attention": one row per pair, "vocabulary": ...}, JSON-ready."""
    sides = [[standardise(found[side][layer]) for layer in sorted(found[side])] for side in ("student", "teacher")]
    attention = []
    for i, (s, t) in enumerate(pairs):
        mean, std = projections.mean[i], projections.std[i]
        projected = (projections(i, found["student"][s]) - mean) / std
        share, first, chance = own_attention(projected, (found["teacher"][t] - mean) / std, found["rows"])
        attention.append({"student": s, "teacher": t, "own": share, "own_is_first": first, "chance": chance})
    return {"cka": [[round(x, 4) for x in row] for row in cka(*sides).tolist()], "attention": attention,
            "vocabulary": {name: found[name].mean().item() for name in ("jsd", "stray")}}


def layers_lines(report):
    """What `before` and `after` say of each pair, as text."""
    before, after = report["before"], report["after"]
    lines = ["student <- teacher     CKA before -> after     attention on the own token     own token first"]
    for old, new in zip(before["attention"], after["attention"]):
        s, t = new["student"], new["teacher"]
        lines.append(f"{s:7} <- {t:<7}        {before['cka'][s - 1][t - 1]:.3f} -> {after['cka'][s - 1][t - 1]:.3f}               "
                     f"{old['own']:.3f} -> {new['own']:.3f}            {old['own_is_first']:.1%} -> {new['own_is_first']:.1%}")
    lines.append(f"(uniform attention would give {after['attention'][0]['chance']:.3f})")
    for when, found in (("before", before["vocabulary"]), ("after", after["vocabulary"])):
        lines.append(f"{when}: JSD {found['jsd']:.4f}, mass on tokens that the teacher gives less than {IMPROBABLE:g}: {found['stray']:.4f}")
    return lines


def plot_layers(before, after, pairs, path):
    """CKA before and after as heat maps with the map drawn on, and the attention on the own token for each pair."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True, width_ratios=[1, 1, 1.1])
    everything = torch.tensor([before["cka"], after["cka"]])
    for axis, report, title in ((axes[0], before, "CKA before"), (axes[1], after, "CKA after")):
        table = torch.tensor(report["cka"])                         # [student layers, teacher layers]
        image = axis.imshow(table, origin="lower", cmap="viridis", vmin=everything.min(), vmax=everything.max(), aspect="auto",
                            extent=(0.5, table.shape[1] + 0.5, 0.5, table.shape[0] + 0.5))
        axis.plot([t for _, t in pairs], [s for s, _ in pairs], "-o", color="white", markersize=6, markeredgecolor="black", label="the map")
        best = (table.argmax(1) + 1).tolist()
        axis.plot(best, range(1, len(best) + 1), "x", color="#e4572e", markersize=8, markeredgewidth=2, label="most alike")
        axis.set(xlabel="teacher layer (reads)", ylabel="student layer (hears)", title=title)
        axis.set_xticks(range(1, table.shape[1] + 1), minor=True)
    axes[0].legend(loc="upper left", fontsize=8)
    figure.colorbar(image, ax=axes[1])
    at = torch.arange(len(pairs))
    for side, (name, report, colour) in enumerate((("before", before, "#b8c4d6"), ("after", after, "#2f5d9b"))):
        axes[2].bar(at + 0.4 * side - 0.2, [row["own"] for row in report["attention"]], 0.38, color=colour, label=name)
    axes[2].axhline(after["attention"][0]["chance"], color="#555555", linestyle="--", linewidth=1, label="chance")
    axes[2].set_xticks(at, [f"{s}\u2190{t}" for s, t in pairs], rotation=60 if len(pairs) > 12 else 0)
    axes[2].set(xlabel="pair, student \u2190 teacher", ylabel="attention on the own token", ylim=(0, 1), title="through W: does it find its token?")
    axes[2].legend(frameon=False)
    axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------------------
# 4. Who gets the gradient

def gradient_shares(loss, student, teacher, **statistics):
    """|d loss / d feature| x the feature's deviation, summed over tokens, as shares of the whole -> [width]. One deviation is the unit in
    which features can be compared: how much of the loss's slope is this feature's?"""
    student = student.detach().clone().requires_grad_()
    loss(student, teacher, **statistics).backward()
    pull = student.grad.abs().sum(0) * layer_map.feature_statistics(teacher)[1]
    return pull / pull.sum()


def features_report(found, pairs, projections):
    """For each divergence, on the models' own features and with feature 0 of both sides multiplied by PLANTED:
    {"natural" or "planted": {divergence: {"largest": share of the gradient on the largest feature, "half": share of the features that holds
    half of the gradient (a half if all are equal)}}}, means over the pairs; "curves": the same pair's shares, sorted, cumulative."""
    scale = torch.ones(projections.mean.shape[1])
    report = {"curves": {}}
    for kind, factor in (("natural", 1.0), ("planted", PLANTED)):
        scale[0] = factor
        rows = {}
        for i, (s, t) in enumerate(pairs):
            student, teacher = projections(i, found["student"][s]).detach() * scale, found["teacher"][t] * scale
            mean, std = layer_map.feature_statistics(teacher)
            for name in ("jsd", "mse", "cosine"):
                for how, statistics in (("raw", {}), ("standardised", {"mean": mean, "std": std})):
                    shares = gradient_shares(losses.HIDDEN[name], student, teacher, **statistics).sort(descending=True).values
                    rows.setdefault(f"{name}, {how}", []).append(shares)
        means = {name: torch.stack(shares).mean(0) for name, shares in rows.items()}                       # [width] each, sorted
        report[kind] = {name: {"largest": share[0].item(), "half": ((share.cumsum(0) < 0.5).sum().item() + 1) / len(share)}
                        for name, share in means.items()}
        report["curves"][kind] = {name: [round(x, 4) for x in share.cumsum(0).tolist()] for name, share in means.items()}
    return report


def features_lines(report):
    lines = [f"{'':24}{'largest feature holds':>24}{'half of it lies on':>24}"]
    for kind in ("natural", "planted"):
        lines += [f"{kind:10}{name:22}{row['largest']:10.1%} of the gradient{row['half']:10.1%} of the features" for name, row in report[kind].items()]
    return lines


def plot_features(report, path):
    """Cumulative share of the gradient over the features, largest first: the diagonal would be fair."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), constrained_layout=True, sharey=True)
    colours = {"jsd": "#2f5d9b", "mse": "#d98c3f", "cosine": "#5fa55a"}
    for axis, kind, title in ((axes[0], "natural", "the models' own features"), (axes[1], "planted", f"one feature {PLANTED:.0f} times larger")):
        for name, curve in report["curves"][kind].items():
            divergence, how = name.split(", ")
            axis.plot(range(1, len(curve) + 1), curve, color=colours[divergence], linestyle="-" if how == "standardised" else ":", label=name)
        width = len(curve)
        axis.plot(range(1, width + 1), [k / width for k in range(1, width + 1)], color="#999999", linewidth=1, label="all features alike")
        axis.set(xlabel="features, largest share first", title=title, xscale="log", ylim=(0, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="share of L_layer's gradient, cumulative")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------------------
# 5. CORD: where do hearing and reading part ways?

@torch.no_grad()
def divergences(student, processor, teacher, examples, *, batch_size=32, max_new_tokens=200, seed=0):
    """One rollout at temperature 1 to each example's audio -> [(its token ids, D_t of each against what `teacher` says reading the transcript)]."""
    banned, pairs = torch.tensor(rollout.banned_ids(student, processor.tokenizer), device=student.device), []
    for start in range(0, len(examples), batch_size):
        prompts = data.encode_prompts(examples[start:start + batch_size], processor, processor.tokenizer, words="transcript")
        said = [r.ids for r in rollout.roll_out(student, processor, prompts, [(1.0, True, False)], key=f"{seed} kl", max_new_tokens=max_new_tokens)]
        logits = []
        for run, model, view in ((models.hear, student, data.audio_view(prompts, range(len(said)), said, processor)),
                                 (models.read, teacher, data.text_view(prompts, range(len(said)), said, processor.tokenizer))):
            view = view.to(model.device)
            last = run(model, **view.inputs)                                                     # [rollouts, seq, hidden]
            logits.append(losses.head_logits(last.flatten(0, 1)[view.predict_positions], models.head_weight(model)).index_fill(-1, banned, losses.FLOOR))
        kl = losses.token_divergence(*logits, beta=1).split([len(ids) for ids in said])          # D_t [tokens]
        pairs += [(ids, row.tolist()) for ids, row in zip(said, kl)]
    return pairs


def kl_report(pairs, tokenizer, *, bins=20, least=5):
    """What divergences() found -> percentiles, mean by position with its correlation, share of all D_t that the largest tenth holds, and the
    tokens with the largest mean D_t (said at least `least` times)."""
    kl = np.array([d for _, row in pairs for d in row])
    place = np.array([t / max(len(row) - 1, 1) for _, row in pairs for t in range(len(row))])    # 0 first token, 1 last
    slot = np.minimum((place * bins).astype(int), bins - 1)
    edges = np.concatenate([[0], np.logspace(-6, 2, 33)])
    said = {}
    for ids, row in pairs:
        for token, d in zip(ids, row):
            said.setdefault(token, []).append(d)
    ranked = sorted(((float(np.mean(d)), token) for token, d in said.items() if len(d) >= least), reverse=True)
    return {"rollouts": len(pairs), "tokens": len(kl), "mean": float(kl.mean()),
            "percentiles": {str(p): float(np.percentile(kl, p)) for p in (50, 80, 90, 95, 99)},
            "tenth": float(np.sort(kl)[-math.ceil(len(kl) / 10):].sum() / max(kl.sum(), 1e-12)),
            "by_position": [float(kl[slot == b].mean()) if (slot == b).any() else None for b in range(bins)],
            "correlation": float(np.corrcoef(kl, place)[0, 1]) if kl.std() and place.std() else 0.0,
            "histogram": {"edges": edges.tolist(), "counts": np.histogram(kl.clip(0, edges[-1]), edges)[0].tolist()},
            "by_token": [{"token": tokenizer.decode([token]), "mean": mean, "count": len(said[token]), "share": sum(said[token]) / max(kl.sum(), 1e-12)}
                         for mean, token in ranked]}


def kl_lines(reports):
    """{"before", "after"} -> lines."""
    lines = []
    for when, r in reports.items():
        p = r["percentiles"]
        lines.append(f"{when}: D_t mean {r['mean']:.3f}, half below {p['50']:.2g}, 80 % below {p['80']:.2g}, 95 % below {p['95']:.2g}; the largest tenth "
                     f"holds {100 * r['tenth']:.0f} % of it; correlation with position {r['correlation']:+.3f} ({r['rollouts']} rollouts)")
        lines.append("    largest on: " + ", ".join(f"{t['token'].strip() or repr(t['token'])} {t['mean']:.2f}" for t in r["by_token"][:10]))
    return lines


def plot_kl(reports, path):
    """How D_t is spread, where along the rollout it lies, and on which tokens."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    colours = dict(zip(reports, ("#b8c4d6", "#2f5d9b") if len(reports) > 1 else ("#2f5d9b",)))
    for when, r in reports.items():
        edges, counts = np.array(r["histogram"]["edges"]), np.array(r["histogram"]["counts"])
        edges[0] = edges[1] / 2
        left.stairs(100 * counts / counts.sum(), edges, fill=True, alpha=0.6, color=colours[when], label=f"{when}: mean {r['mean']:.3f}")
        left.axvline(r["percentiles"]["80"], color=colours[when], linestyle="--", linewidth=1.2, label=f"80 % below {r['percentiles']['80']:.2g}")
        at = [(b + 0.5) / len(r["by_position"]) for b in range(len(r["by_position"]))]
        middle.plot(at, [v if v is not None else np.nan for v in r["by_position"]], "-o", markersize=3, color=colours[when],
                    label=f"{when}: correlation {r['correlation']:+.2f}")
    left.set(xscale="log", xlabel="D_t (nats)", ylabel="tokens (%)", title="most tokens agree, few do not")
    middle.set(xlabel="position in the rollout (0 first token, 1 last)", ylabel="mean D_t (nats)", title="where", ylim=(0, None))
    first = next(iter(reports.values()))["by_token"][:15]
    for (when, r), thick in zip(reports.items(), (0.8, 0.4)):
        means = {t["token"]: t["mean"] for t in r["by_token"]}
        right.barh(range(len(first)), [means.get(t["token"], 0) for t in first], thick, color=colours[when], label=when)
    right.set_yticks(range(len(first)), [t["token"].strip() or repr(t["token"]) for t in first])
    right.invert_yaxis()
    right.set(xlabel="mean D_t (nats)", title="on which tokens")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------
# 6. The commands

def settings_of(model):
    """The flags of the run that a checkpoint belongs to; none for another model."""
    if not (model / "checkpoint.json").exists():
        return {}
    return read_json(model.parent / "config.json", "a run's flags")


def load(name):
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    student, processor = models.load_audio_model(str(name), dtype=dtype)
    return student.to("cuda" if gpu else "cpu"), processor


def run_layers(args, out):
    """layers and features: JSON, a PNG and a few lines. A checkpoint's run names its teacher and the
    student that it started from. Every second example fits W_i, the others are looked at."""
    model = Path(args.model)
    settings = settings_of(model)
    teacher_name = args.teacher or settings.get("teacher")
    if not teacher_name:
        raise data.DataError(f"{model}: is no checkpoint of a run, so nobody knows its teacher; "
                             "give --teacher")
    examples = data.read_manifest(args.data, split=args.split)
    examples = [e for e in examples if e.task != evaluate.SER_TASK]
    examples = [e for e in examples if e.reasoning and e.description]
    most = min(len(examples), args.limit or 80)
    if most < 4:
        raise data.DataError(f"{args.data}: has {most} examples with reasoning and description; at "
                             "least 4 are needed")
    # spread over the file, so that every task is there however it is sorted
    examples = [examples[i * len(examples) // most] for i in range(most)]

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    teacher, tokenizer = models.load_text_model(teacher_name, dtype=dtype)
    models.check_teacher(teacher.to("cuda" if gpu else "cpu"))

    def states_of(name):
        student, processor = load(name)
        parts = examples[::2], examples[1::2]
        return [states(student, processor, teacher, tokenizer, part) for part in parts]

    start = settings.get("student", model) if args.task == "layers" else model
    fitting, seen = states_of(start)
    pairs = layer_map.pairs(len(seen["student"]), len(seen["teacher"]))     # the whole map
    projections = fit(pairs, fitting)
    if args.task == "features":
        report = features_report(seen, pairs, projections)
        with writing(out / "features.png"):
            plot_features(report, out / "features.png")
        print(*features_lines(report), sep="\n")
    else:
        before = layers_report(seen, pairs, projections)
        fitting, seen = states_of(model)
        projections = fit(pairs, fitting)                   # for pairs that the run did not distil
        saved = model / "projections.safetensors"
        if saved.exists():
            projections = trained(saved, pairs, projections)
        after = layers_report(seen, pairs, projections)
        report = {"pairs": pairs, "before": before, "after": after}
        report["vocabulary"] = after["vocabulary"]
        with writing(out / "layers.png"):
            plot_layers(before, after, pairs, out / "layers.png")
        print(*layers_lines(report), sep="\n")
    write_json(out / f"{args.task}.json", report)
    print(f"{out}: {args.task}.json, {args.task}.png")


def run_kl(args, out):
    """The spread of D_t over rollouts. The student that a run started from is the teacher, before
    and after training."""
    model = Path(args.model)
    settings = settings_of(model)
    examples = evaluate.spoken(data.read_manifest(args.data, split=args.split))
    examples = examples[:args.limit or 200]
    if not examples:
        raise data.DataError(f"{args.data}: has no example with a transcript, so no text view can "
                             "be compared; add transcripts")
    teacher, processor = load(settings.get("student", model))
    students = {"before": teacher}
    if settings:
        students["after"], _ = load(model)
    reports = {}
    for when, student in students.items():
        how = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
        pairs = divergences(student, processor, teacher, examples, seed=args.seed, **how)
        reports[when] = kl_report(pairs, processor.tokenizer)
    write_json(out / "kl.json", reports)
    with writing(out / "kl.png"):
        plot_kl(reports, out / "kl.png")
    print(*kl_lines(reports), sep="\n")
    print(f"{out}: kl.json, kl.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=["layers", "features", "kl"])
    add("--model", metavar="DIR", required=True, help="an audio language model, or a run's folder")
    add("--data", metavar="FILE", required=True, help="a manifest (JSONL; see data.py)")
    add("--teacher", metavar="DIR",
        help="layers, features: the text LLM; default: the one that the run of --model names")
    add("--split", help="only the manifest's examples of this split")
    add("--limit", type=int, help="layers, features: 80 examples, spread over the file; kl: 200")
    add("--out", default="runs/evaluate", help="folder (default %(default)s)")
    add("--batch-size", type=int, default=16, help="kl: rollouts at once")
    add("--max-new-tokens", type=int, default=200, help="kl: tokens of a rollout (paper B: 200)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    out = make_folder(args.out)
    try:
        args.model = models.newest_checkpoint(args.model)
        run = run_kl if args.task == "kl" else run_layers
        run(args, out)
    except data.DataError as error:
        raise SystemExit(f"lab.inside: {error}") from None


if __name__ == "__main__":
    main()
