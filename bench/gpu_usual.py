"""The usual pattern that `gpu_ways.py` compares with: a solo Celery worker, the model loaded, one `generate` a task."""

import os

import torch
from celery import Celery
from gpu_crew import MODEL, NEW_TOKENS
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentmesh.hub.cache import model_folder
from agentmesh.inference.device import best_dtype

app = Celery("usual", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BROKER"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
folder = str(model_folder(MODEL))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=best_dtype(DEVICE)).to(DEVICE).eval()


@app.task(name="usual.ask")
def ask(text: str) -> str:
    """One prompt, one call of `generate`, all threads."""
    turns = [{"role": "user", "content": text}]
    given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(
        DEVICE
    )
    with torch.inference_mode():
        out = model.generate(
            **given,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
