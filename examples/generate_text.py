"""Continue a text, and several at once.

python examples/generate_text.py [MODEL]

MODEL is a checkpoint folder or a hub id such as google/gemma-4-E4B-it. The default is the tiny
model that comes with the package; the other examples take the same argument.
"""

import sys

from gemma4_fast import Gemma4

model = Gemma4.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")

prompt = "It is a truth universally acknowledged"
result = model.generate(prompt, max_new_tokens=24, seed=1)
print(f"{prompt}{result.text}")
print(f"{len(result.token_ids)} tokens, stopped by: {result.finish_reason}")

# A list of prompts gives a list of results. Temperature 0 takes the likeliest token each time.
prompts = ["The sun", "My dear Mr. Bennet,"]
results = model.generate(prompts, max_new_tokens=12, temperature=0)
for prompt, result in zip(prompts, results, strict=True):
    print(f"{prompt}{result.text}")
