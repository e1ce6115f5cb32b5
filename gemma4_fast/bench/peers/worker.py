"""The process that one contender of the model benchmark lives in: `python worker.py with_vllm.py`.

It speaks JSON lines: a request on stdin, an answer on stdout. Whatever else prints goes to stderr. Standard library only,
as a peer may be installed for another interpreter than this package.

    {"do": "load", ...}                       -> {"ok": true, "version": "0.32.0", "note": "..."}
    {"do": "prompt", "variant": "",
     "ids": [[...], ...], "new": 64}          -> {"ok": true, "first_s": 0.2, "steps_s": [...], "tokens": [[...], ...]}
    {"do": "depth", ...the same...}           -> {"ok": true, "steps_s": [...], "tokens": [[...], ...]}
    {"do": "score", ...the same...}           -> {"ok": true, "top": [[id, logprob], ...]}
    {"do": "step", ...the same...}            -> {"ok": true, "steps_s": [...], "parts_s": {"linear": [...], ...},
                                                  "launches": 200}
    {"do": "check", "variant": ""}            -> {"ok": true, "right": true, "verdict": "..."}
    {"do": "quit"}
    anything that fails                       -> {"ok": false, "status": "out of memory", "message": "..."}

A contender is a file with a class `Peer`:

    load(spec) -> dict      spec: path (checkpoint folder; None: dummy weights from the seed), gguf (the same as a GGUF file,
                            for llama.cpp), config (flat config.json as a dict), dtype, quantize, device, threads, seed,
                            max_len (longest prompt + new tokens), max_batch, memory_bytes (what may be used). Gives the
                            peer's version, and, if it has one, a note for its rows.
    prompt(variant, ids, new) -> first_s, steps_s, tokens
                            Greedy, no stop token. ids [B][P] were never seen before. first_s: seconds from the call to the
                            first new token of every sequence; steps_s [new - 1]: seconds of each further token; tokens
                            [B][new], or [] from one that does not tell them. steps_s may hold one average instead.
    depth(variant, ids, new) -> steps_s, tokens
                            The same ids [B][P] each time: the state they leave may be kept from call to call, and need not
                            be theirs (the fastest way to a full cache will do). steps_s [new]: seconds of each new token.
    score(variant, ids, top) -> [(id, logprob)]
                            The `top` likeliest next tokens after ids [1][P], natural logs. (A peer may lack it.)
    step, check             this package alone: a decode step by op, and the self-check.

With CUDA in use an answer also has peak_bytes: the most that PyTorch held on the device meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any


class Unsupported(Exception):
    """A valid request that this contender cannot serve; the message is the row's."""


def fault(e: BaseException) -> dict[str, Any]:
    """What went wrong, in the words a row uses."""
    text = " ".join(str(e).split())[:300]
    # By name: a peer's file is loaded beside this one, and has its own way to the class.
    if type(e).__name__ in ("Unsupported", "UnsupportedError"):
        return {"ok": False, "status": "unsupported", "message": text}
    if isinstance(e, ModuleNotFoundError):
        return {"ok": False, "status": "missing", "message": f"{e.name} is not installed"}
    if isinstance(e, FileNotFoundError) and e.errno is None:  # a program, looked for by the peer's own file
        return {"ok": False, "status": "missing", "message": text}
    if isinstance(e, MemoryError) or re.search(r"out of memory|can't allocate memory|not enough memory|bad_alloc", text, re.I):
        return {"ok": False, "status": "out of memory", "message": text or "MemoryError"}
    return {"ok": False, "status": "failed", "message": f"{type(e).__name__}: {text}"}


def answer(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    what, variant = request.pop("do"), request.get("variant", "")
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    counting = cuda is not None and cuda.is_available() and cuda.is_initialized()
    if counting:
        cuda.empty_cache()  # blocks that an earlier turn left would count for this one
        cuda.reset_peak_memory_stats()
    if what == "load":
        found = peer.load(request)
    elif what == "prompt":
        first, steps, tokens = peer.prompt(variant, request["ids"], request["new"])
        found = {"first_s": first, "steps_s": steps, "tokens": tokens}
    elif what == "depth":
        steps, tokens = peer.depth(variant, request["ids"], request["new"])
        found = {"steps_s": steps, "tokens": tokens}
    elif what == "score":
        if not hasattr(peer, "score"):
            return {"ok": False, "status": "unsupported", "message": "gives no log-probabilities"}
        found = {"top": peer.score(variant, request["ids"], request["new"])}
    elif what == "step":
        steps, parts, launches = peer.step(variant, request["ids"], request["new"])
        found = {"steps_s": steps, "parts_s": parts, "launches": launches}
    elif what == "check":
        right, verdict = peer.check(variant)
        found = {"right": right, "verdict": verdict}
    else:
        raise ValueError(f"unknown request {what!r}")
    if getattr(peer, "elsewhere", False):  # in a process of its own, whose memory this one does not see
        found["peak_bytes"] = None
    elif counting:
        found["peak_bytes"] = cuda.max_memory_reserved()
    return {"ok": True, **found}


def main() -> None:
    # The answers keep the real stdout; libraries, C ones too, get stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        del sys.path[0]  # so that no file beside this one can stand in for a library
    file = Path(sys.argv[1])
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    peer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            if peer is None:
                module_spec.loader.exec_module(module)
                peer = module.Peer()
            reply = json.dumps(answer(peer, request))
        except Exception as e:  # noqa: BLE001  whatever a foreign library raises becomes a row
            if not isinstance(e, ImportError):
                traceback.print_exc()
            reply = json.dumps(fault(e))
        answers.write(reply + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
