"""Run a model of transformers on the kernels of this package: one line more.

python examples/accelerate_transformers.py [MODEL]

Needs the extra `transformers`: pip install "gemma4-fast[transformers]"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import gemma4_fast
from gemma4_fast.weights import resolve

folder = resolve(sys.argv[1] if len(sys.argv) > 1 else "tiny")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
inputs = tokenizer("It is a truth universally acknowledged", return_tensors="pt")

gemma4_fast.accelerate(model)
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

print(gemma4_fast.verify(model))  # compares it with transformers' own code, layer by layer
gemma4_fast.restore(model)  # the model is as it was
