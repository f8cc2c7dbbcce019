"""The engines: everything that would be the same without HTTP.

Rooms, leaves first; each may import only those above it:

    work.py          the contract: what an engine is, what one request's work is, every error an engine raises
    model_files.py   hub ids, the cache, the embedded model, the download
    download.py      `gpu-service download`: fetches models for a machine that goes offline
    tokenizing.py    texts to ids
    messages.py      what crosses between the service and the engine's process
    link.py          the service's side of the boundary: starts the engine, sends, receives, notices its death
    device.py        cores, threads, memory, which errors mean what
    packing.py       ids to batches
    matching.py      greedy matching of token embeddings
    deberta_kernel.py  a Triton kernel for DeBERTa's attention, where there is Triton
    attention.py     kinds of attention, those a device may have tried once
    fast_encoder.py  our forward for BERT, RoBERTa, DeBERTa v1 and their kin
    graphs.py        CUDA graphs of it
    token_model.py   the forward that serves: ours or transformers', its precision
    token_engine.py  what the engines of tokens share: calibration, lanes, the float32 retry
    bertscore.py     one task each: engine, work, load
    embedding.py
    reranking.py
    loading.py       loads an engine of any kind
    check.py         `gpu-service check`: torch's build, the device, memory, models, precision
    fair_queue.py    who is next on the device
    output_cache.py  outputs of repeated texts
    batches.py       batches on the device: launched, landed, handed out
    worker.py        the device thread; knows no model
    process.py       the engine's side of the boundary: reads messages, loads, computes, answers
    __main__.py      starts it in a process of its own

The service imports the first six, none of which imports torch.
Nothing here imports a web framework, asyncio, or the service.
"""

import os

# Read by libraries when they are imported, so they have to be here before torch is. An OpenMP thread spins for some
# 100 µs before it sleeps: longer than the pause between two operators, and not for as long as by default on a core
# that the service needs. The hub client is told not to phone home.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")  # else desktop cards attend in float32
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
