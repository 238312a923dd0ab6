# Answers to the assignment `prompts`: wrong ones, named after the misconception, and right ones written differently.
import math
import re

import torch
from torch.nn import functional as F


# %% fill_template wrong: the text in front
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError(template)
    return text + template.replace("{text}", "")


# %% fill_template wrong: only the first place
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError(template)
    return template.replace("{text}", text, 1)


# %% fill_template wrong: no error
def fill_template(template, text):
    return template.replace("{text}", text)


# %% fill_template wrong: spaces are cut
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError(template)
    return " ".join(template.replace("{text}", text).split())


# %% fill_template wrong: str.format
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError(template)
    return template.format(text=text)


# %% fill_template wrong: str.format with a mask
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError(template)
    return template.format("", text=text, mask="{mask}")


# %% fill_template wrong: any word text
def fill_template(template, text):
    if "text" not in template:
        raise ValueError(template)
    return template.replace("{text}", text)


# %% fill_template wrong: an IndexError
def fill_template(template, text):
    parts = template.split("{text}")
    parts[1]
    return text.join(parts)


# %% fill_template right: split and join
def fill_template(template, text):
    parts = template.split("{text}")
    if len(parts) == 1:
        raise ValueError("no place for the text")
    return text.join(parts)


# %% fill_template right: a regular expression
def fill_template(template, text):
    filled, places = re.subn(r"\{text\}", lambda match: text, template)
    if not places:
        raise ValueError("no place for the text")
    return filled


# %% score_verbalizer wrong: sum of logarithms
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].sum(-1) for ids in verbalizer.values()], 1).log_softmax(-1)


# %% score_verbalizer wrong: mean of logarithms
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].mean(-1) for ids in verbalizer.values()], 1).log_softmax(-1)


# %% score_verbalizer wrong: mean of probabilities
def score_verbalizer(log_probs, verbalizer):
    scores = [log_probs[:, ids].logsumexp(-1) - math.log(len(ids)) for ids in verbalizer.values()]
    return torch.stack(scores, 1).log_softmax(-1)


# %% score_verbalizer wrong: the likeliest word
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].amax(-1) for ids in verbalizer.values()], 1).log_softmax(-1)


# %% score_verbalizer wrong: not normalised
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].logsumexp(-1) for ids in verbalizer.values()], 1)


# %% score_verbalizer wrong: normalised over the rows
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].logsumexp(-1) for ids in verbalizer.values()], 1).log_softmax(0)


# %% score_verbalizer wrong: probabilities
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].logsumexp(-1) for ids in verbalizer.values()], 1).softmax(-1)


# %% score_verbalizer wrong: it underflows
def score_verbalizer(log_probs, verbalizer):
    odds = torch.stack([log_probs.exp()[:, ids].sum(-1) for ids in verbalizer.values()], 1)
    return (odds / odds.sum(1, keepdim=True)).log()


# %% score_verbalizer wrong: a small number against the underflow
def score_verbalizer(log_probs, verbalizer):
    odds = torch.stack([log_probs.exp()[:, ids].sum(-1) for ids in verbalizer.values()], 1) + 1e-12
    return (odds / odds.sum(1, keepdim=True)).log()


# %% score_verbalizer wrong: transposed
def score_verbalizer(log_probs, verbalizer):
    return torch.stack([log_probs[:, ids].logsumexp(-1) for ids in verbalizer.values()]).log_softmax(0)


# %% score_verbalizer right: the largest taken out by hand
def score_verbalizer(log_probs, verbalizer):
    chosen = [i for ids in verbalizer.values() for i in ids]
    p = (log_probs - log_probs[:, chosen].amax(1, keepdim=True)).double()
    found = []
    for ids in verbalizer.values():
        top = p[:, ids].amax(1)
        found.append(top + (p[:, ids] - top[:, None]).exp().sum(1).log())
    scores = torch.stack(found, -1)
    return (scores - torch.logsumexp(scores, 1, keepdim=True)).to(log_probs.dtype)


# %% score_verbalizer right: a mask of words
def score_verbalizer(log_probs, verbalizer):
    member = torch.full((len(verbalizer), log_probs.shape[1]), -math.inf, dtype=log_probs.dtype)
    for row, ids in zip(member, verbalizer.values(), strict=True):
        row[ids] = 0.0
    joint = torch.logsumexp(log_probs[:, None] + member, 2)
    return joint - joint.logsumexp(1)[:, None]


# %% prepend wrong: added
def prepend(prompt, embeds, mask, labels):
    embeds = embeds.clone()
    n = min(len(prompt), embeds.shape[1])
    embeds[:, :n] += prompt[:n].to(embeds.dtype)
    return embeds, mask, labels


# %% prepend wrong: after the text
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([embeds, prompt.to(embeds.dtype).expand(rows, -1, -1)], 1)
    return (
        embeds,
        torch.cat([mask, mask.new_ones(rows, n)], 1),
        torch.cat([labels, labels.new_full((rows, n), -100)], 1),
    )


# %% prepend wrong: the mask is not extended
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return embeds, mask, torch.cat([labels.new_full((rows, n), -100), labels], 1)


# %% prepend wrong: zeros in the mask
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return (
        embeds,
        torch.cat([mask.new_zeros(rows, n), mask], 1),
        torch.cat([labels.new_full((rows, n), -100), labels], 1),
    )


# %% prepend wrong: labels are not extended
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return embeds, torch.cat([mask.new_ones(rows, n), mask], 1), labels


# %% prepend wrong: labels of zero
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return embeds, torch.cat([mask.new_ones(rows, n), mask], 1), torch.cat([labels.new_zeros(rows, n), labels], 1)


# %% prepend wrong: the first labels are overwritten
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    labels = torch.cat([labels, labels.new_full((rows, n), -100)], 1)
    labels[:, :n] = -100
    return embeds, torch.cat([mask.new_ones(rows, n), mask], 1), labels


# %% prepend wrong: everything becomes float32
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.expand(rows, -1, -1), embeds], 1)
    return (
        embeds,
        torch.cat([mask.new_ones(rows, n), mask], 1),
        torch.cat([labels.new_full((rows, n), -100), labels], 1),
    )


# %% prepend wrong: the mask becomes float32
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return embeds, torch.cat([torch.ones(rows, n), mask], 1), torch.cat([labels.new_full((rows, n), -100), labels], 1)


# %% prepend wrong: no gradient
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.data.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return (
        embeds,
        torch.cat([mask.new_ones(rows, n), mask], 1),
        torch.cat([labels.new_full((rows, n), -100), labels], 1),
    )


# %% prepend wrong: in the first row only
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    front = embeds.new_zeros(rows, n, embeds.shape[2])
    front[0] = prompt
    embeds = torch.cat([front, embeds], 1)
    return (
        embeds,
        torch.cat([mask.new_ones(rows, n), mask], 1),
        torch.cat([labels.new_full((rows, n), -100), labels], 1),
    )


# %% prepend right: padding
def prepend(prompt, embeds, mask, labels):
    n = len(prompt)
    front = torch.stack([prompt] * len(embeds)).type_as(embeds)
    return torch.hstack([front, embeds]), F.pad(mask, (n, 0), value=1), F.pad(labels, (n, 0), value=-100)


# %% prepend right: filled
def prepend(prompt, embeds, mask, labels):
    (rows, length, d), n = embeds.shape, prompt.shape[0]
    out = torch.empty(rows, n + length, d, dtype=embeds.dtype)
    out[:, :n], out[:, n:] = prompt, embeds
    longer_mask, longer = mask.new_empty(rows, n + length), labels.new_empty(rows, n + length)
    longer_mask[:, :n], longer_mask[:, n:] = 1, mask
    longer[:, :n], longer[:, n:] = -100, labels
    return [out, longer_mask, longer]


# %% init_from_vocabulary wrong: the first rows
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return table[:n].detach().clone()


# %% init_from_vocabulary wrong: the first rows, shuffled
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return table[torch.randperm(n, generator=generator)].detach().clone()


# %% init_from_vocabulary wrong: with replacement
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return table[torch.randint(len(table), (n,), generator=generator)].detach().clone()


# %% init_from_vocabulary wrong: the global generator
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return table[torch.randperm(len(table))[:n]].detach().clone()


# %% init_from_vocabulary wrong: the global generator with the same seed
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    torch.manual_seed(generator.initial_seed())
    return table[torch.randperm(len(table))[:n]].detach().clone()


# %% init_from_vocabulary wrong: the gradient runs on
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return table[torch.randperm(len(table), generator=generator)[:n]].clone()


# %% init_from_vocabulary wrong: a window of the table, shared
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    start = torch.randint(len(table) - n + 1, (), generator=generator)
    return table.detach()[start : start + n]


# %% init_from_vocabulary wrong: noise
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return torch.randn(n, table.shape[1], generator=generator)


# %% init_from_vocabulary wrong: too few rows without a word
def init_from_vocabulary(table, n, generator):
    return table[torch.randperm(len(table), generator=generator)[:n]].detach().clone()


# %% init_from_vocabulary wrong: the mean of the table
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(n)
    return table.detach().mean(0).expand(n, -1).clone()


# %% init_from_vocabulary right: multinomial
def init_from_vocabulary(table, n, generator):
    words = table.shape[0]
    if words < n:
        raise ValueError("too many rows")
    chosen = torch.multinomial(torch.ones(words), n, replacement=False, generator=generator)
    return torch.tensor(table.detach()[chosen].tolist(), dtype=table.dtype)


# %% init_from_vocabulary right: a parameter already
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError("too many rows")
    order = torch.rand(len(table), generator=generator).argsort()
    with torch.no_grad():
        return torch.nn.Parameter(torch.index_select(table, 0, order[:n]))


# %% nearest_words wrong: dot product
def nearest_words(prompt, table, k):
    return (prompt @ table.T).topk(k).indices


# %% nearest_words wrong: only the prompt is normalised
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ table.T).topk(k).indices


# %% nearest_words wrong: the norm runs over the words
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=0) @ F.normalize(table, dim=0).T).topk(k).indices


# %% nearest_words wrong: distance
def nearest_words(prompt, table, k):
    return torch.cdist(prompt, table).topk(k, largest=False).indices


# %% nearest_words wrong: lowest
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).topk(k, largest=False).indices


# %% nearest_words wrong: without a sign
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).abs().topk(k).indices


# %% nearest_words wrong: the cosines themselves
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).topk(k).values


# %% nearest_words wrong: best last
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argsort(dim=-1)[:, -k:]


# %% nearest_words wrong: the nearest vector of each word
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).topk(min(k, len(prompt)), dim=0).indices.T


# %% nearest_words wrong: zero divided by zero
def nearest_words(prompt, table, k):
    cosine = prompt @ table.T / (prompt.norm(dim=1)[:, None] * table.norm(dim=1))
    return cosine.topk(k).indices


# %% nearest_words wrong: the padding is never named
def nearest_words(prompt, table, k):
    cosine = F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T
    return cosine.masked_fill((table == 0).all(-1), -2.0).topk(k).indices


# %% nearest_words wrong: squared length
def nearest_words(prompt, table, k):
    return (prompt @ (table / table.square().sum(1, keepdim=True).clamp(min=1e-12)).T).topk(k).indices


# %% nearest_words right: cosine_similarity
def nearest_words(prompt, table, k):
    return F.cosine_similarity(prompt[:, None], table[None], dim=-1).argsort(dim=-1, descending=True)[:, :k]


# %% nearest_words right: only the table is normalised
def nearest_words(prompt, table, k):
    unit = table / table.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.stack([(unit @ row).sort(descending=True).indices[:k] for row in prompt])


# %% repaired_prompt wrong: as it was
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    (rows, length), n = mask.shape, len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_zeros(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions], 1),
    )
    logits = logits[:, :length]
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# %% repaired_prompt wrong: the mask hides the prompt
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_zeros(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: positions start again
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: positions count the padding
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.arange(n + embeds.shape[1]).expand(rows, -1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: the text's last logits are cut off
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    (rows, length), n = mask.shape, len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, :length]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: nothing is cut off
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )
    return logits, F.cross_entropy(logits[:, n:-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: each token predicts itself
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# %% repaired_prompt wrong: the prompt predicts the first token
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )
    return logits[:, n:], F.cross_entropy(logits[:, n - 1 : -1].flatten(0, 1), labels.flatten())


# %% repaired_prompt wrong: the prompt is added
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    n = len(prompt)
    embeds = torch.cat([embeds[:, :n] + prompt, embeds[:, n:]], 1)
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: the prompt is detached
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.detach().expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt wrong: the loss is a sum
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


# %% repaired_prompt right: labels as long as all that is read
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    n = len(prompt)
    front = torch.stack([prompt for _ in embeds])
    places = torch.cat([torch.arange(n)[None].repeat(len(embeds), 1), n + positions], 1)
    logits = model(torch.cat([front, embeds], 1), F.pad(mask, (n, 0), value=1), places)
    longer = F.pad(labels, (n, 0), value=-100)
    longer[:, n] = -100
    return logits[:, n:], F.cross_entropy(logits[:, :-1].transpose(1, 2), longer[:, 1:])


# %% repaired_prompt right: by hand
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    n = prompt.shape[0]
    longer_mask = torch.cat([torch.ones(len(mask), n, dtype=torch.bool), mask.bool()], dim=1)
    places = (longer_mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(torch.cat([prompt.repeat(len(mask), 1, 1), embeds], dim=1), longer_mask, places)[:, n:]
    log_p = logits.log_softmax(-1)
    kept = [(r, i) for r in range(len(mask)) for i in range(1, mask.shape[1]) if labels[r, i] != -100]
    return logits, -sum(log_p[r, i - 1, labels[r, i]] for r, i in kept) / len(kept)


# %% fill_template wrong: re.sub, which reads the text
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError("no place")
    import re

    return re.sub(re.escape("{text}"), text, template)


# %% score_verbalizer wrong: through numpy
def score_verbalizer(log_probs, verbalizer):
    import numpy as np

    p = log_probs.detach().numpy()
    scores = np.stack([np.logaddexp.reduce(p[:, ids], 1) for ids in verbalizer.values()], 1)
    return torch.as_tensor(scores).log_softmax(-1)


# %% nearest_words right: int32
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).topk(k).indices.int()


# %% init_from_vocabulary wrong: a run of neighbours from a random start
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError("too many")
    start = torch.randint(len(table) - n + 1, (1,), generator=generator).item()
    return table[start : start + n].detach().clone()


# %% fill_template wrong: spaces are tidied
def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError("no {text}")
    return template.replace("{text}", text.rstrip("\n"))


# %% init_from_vocabulary wrong: neighbours from a random place
def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError("too many")
    start = torch.randint(len(table), (1,), generator=generator).item()
    return table[(torch.arange(n) + start) % len(table)].detach().clone()


# %% prepend wrong: the mask copies the text's first place
def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    e = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return (
        e,
        torch.cat([mask[:, :1].expand(rows, n), mask], 1),
        torch.cat([labels.new_full((rows, n), -100), labels], 1),
    )


# %% nearest_words wrong: cosines rounded
def nearest_words(prompt, table, k):
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).round(decimals=3).topk(k).indices


# %% repaired_prompt wrong: leaves the model in training
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    model.train()
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([mask.new_ones(rows, n), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# %% repaired_prompt right: loss by hand
def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    n = prompt.shape[0]
    rows = embeds.shape[0]
    x = torch.cat([prompt.unsqueeze(0).repeat(rows, 1, 1), embeds], dim=1)
    see = F.pad(mask, (n, 0), value=1)
    at = torch.cat([torch.arange(n, dtype=positions.dtype)[None].repeat(rows, 1), positions + n], dim=1)
    logits = model(x, see, at)[:, n:]
    next_ = labels[:, 1:]
    real = next_ != -100
    lp = logits[:, :-1].log_softmax(-1)[real]
    return logits, -lp.gather(1, next_[real][:, None]).mean()


# %% score_verbalizer wrong: rows and words where it is square
def score_verbalizer(log_probs, verbalizer):
    t = log_probs.T if log_probs.shape[0] == log_probs.shape[1] else log_probs
    scores = [t[:, ids].logsumexp(-1) for ids in verbalizer.values()]
    return torch.stack(scores, 1).log_softmax(-1)
