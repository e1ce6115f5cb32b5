"""Load a model with weights of 8 and 4 bits, and see what that saves and costs.

python examples/quantize_weights.py [MODEL]
"""

import sys

from gemma4_fast import Gemma4
from gemma4_fast.generate import perplexity

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife."
name = sys.argv[1] if len(sys.argv) > 1 else "tiny"

for bits in (None, "int8", "int4"):
    model = Gemma4.from_pretrained(name, quantize=bits)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    score, _ = perplexity(model, model.tokenizer.encode(TEXT, add_bos=False))
    text = model.generate("It is a truth", max_new_tokens=8, temperature=0).text
    print(f"{bits or 'bf16'}: {size / 1e6:.1f} MB, perplexity {score:.2f}, It is a truth{text}")
