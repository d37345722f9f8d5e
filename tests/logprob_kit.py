"""Top-k log-probabilities as a server would write them, made with plain transformers."""

import json
from pathlib import Path

import torch


def top(model, ids: list[int], k: int) -> list[list[tuple[int, float]]]:
    """For each position but the last, the `k` likeliest next ids with their log-probabilities."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    values, found = torch.log_softmax(logits.float(), dim=-1).topk(k)
    pairs = zip(found.tolist(), values.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


def with_next(model, ids: list[int], k: int) -> list[list[tuple[int, float]]]:
    """The same, and the token that came next, as servers add it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    entries = top(model, ids, k)
    for t, after in enumerate(ids[1:]):
        if after not in dict(entries[t]):
            entries[t].append((after, float(log_probs[t, after])))
    return entries


def plain(model, ids: list[int], k: int) -> dict:
    entries = top(model, ids, k)
    return {
        "input_ids": ids,
        "top_ids": [[i for i, _ in entry] for entry in entries],
        "top_logprobs": [[x for _, x in entry] for entry in entries],
    }


def vllm(model, ids: list[int], k: int) -> dict:
    """A completions response of vLLM's server with `prompt_logprobs` and `return_token_ids`."""
    entries = with_next(model, ids, k)
    listed = [
        {
            str(i): {"logprob": x, "rank": rank, "decoded_token": "?"}
            for rank, (i, x) in enumerate(entry, 1)
        }
        for entry in entries
    ]
    choice = {"index": 0, "text": "", "prompt_logprobs": [None, *listed], "prompt_token_ids": ids}
    return {"object": "text_completion", "choices": [choice]}


def vllm_output(model, ids: list[int], k: int) -> dict:
    """What vLLM's offline `generate` returns, its dictionary as pairs for Arrow's map."""
    entries = with_next(model, ids, k)
    listed = [[(i, {"logprob": x, "rank": 1}) for i, x in entry] for entry in entries]
    return {"prompt_token_ids": ids, "prompt_logprobs": [None, *listed]}


def chat(model, ids: list[int], k: int, spelled: dict[int, bytes], begin: int) -> dict:
    """A chat response of OpenAI's shape: tokens `begin` and on are the completion."""

    def token(token_id: int, log_prob: float) -> dict:
        text = spelled[token_id].decode(errors="replace")
        return {"token": text, "bytes": list(spelled[token_id]), "logprob": log_prob}

    content = []
    for t, entry in enumerate(with_next(model, ids, k)[begin - 1 :], begin):
        own = token(ids[t], dict(entry)[ids[t]])
        content.append({**own, "top_logprobs": [token(*pair) for pair in entry[:k]]})
    choice = {"index": 0, "message": {"role": "assistant"}, "logprobs": {"content": content}}
    return {"prompt_token_ids": ids[:begin], "choices": [choice]}


def completions(model, ids: list[int], k: int) -> dict:
    """An echoed completion of OpenAI's older shape, tokens written by id as vLLM does on demand."""
    entries = with_next(model, ids, k)
    log_probs = {
        "tokens": [f"token_id:{i}" for i in ids],
        "token_logprobs": [None, *(dict(e)[i] for e, i in zip(entries, ids[1:], strict=True))],
        "top_logprobs": [None, *({f"token_id:{i}": x for i, x in e} for e in entries)],
        "text_offset": [0] * len(ids),
    }
    return {"choices": [{"index": 0, "text": "", "logprobs": log_probs}]}


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
