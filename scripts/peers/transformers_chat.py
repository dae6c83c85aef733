"""A minimal chat with transformers: python transformers_chat.py MODEL DTYPE PROMPT TOKENS."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, dtype, prompt, tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
message = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.inference_mode():
    answer = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
