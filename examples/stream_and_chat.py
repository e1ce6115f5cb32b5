"""Print text while it is generated, then hold a short conversation.

python examples/stream_and_chat.py [MODEL]
"""

import sys

from gemma4_fast import Gemma4

model = Gemma4.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")

for piece in model.stream("It is a truth universally acknowledged", max_new_tokens=24, seed=1):
    print(piece, end="", flush=True)
print()

# A prompt may also be a list of messages. The model sees the whole conversation at each turn.
messages: list[dict[str, str | None]] = []
for question in ("What is your name?", "Where do you live?"):
    messages.append({"role": "user", "content": question})
    print(f"> {question}")
    answer = model.stream(messages, max_new_tokens=24, seed=1)
    for piece in answer:
        print(piece, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer.result.text})
