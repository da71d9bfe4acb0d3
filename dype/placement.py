"""Where a pipeline's parts are, and how its autoencoder decodes."""

from contextlib import contextmanager

import torch

from dype import memory

QWEN_TILE = 1024  # px


def place(pipe, device: str, offload: str, apart: dict[str, str], pixels: int) -> None:
    """Put the pipeline on its device, whole or in turns; `apart` names parts with a place of
    their own. Prints what "auto" chose, and why."""
    for name, elsewhere in apart.items():
        getattr(pipe, name).to(elsewhere)
    pipe.dype_apart = apart
    with set_aside(pipe, *apart):
        parts = {
            n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)
        }
        sizes = memory.sizes(parts)
        kind = torch.device(device).type
        there = [name for name, part in parts.items() if part.device.type == kind]
        free = memory.free(device) + sum(sizes[name] for name in there)  # bitsandbytes' are, say
        if offload == "auto":
            offload, why = memory.choose_offload(device, free, sizes, pixels)
            if why:
                print(f"offload {offload}: {why}")
        pipe.dype_offload = offload
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "group":
            stream = torch.device(device).type == "cuda"
            pipe.enable_group_offload(
                torch.device(device), offload_type="leaf_level", use_stream=stream
            )
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            for part in parts.values():
                part.to(device)
        where = apart.get("vae", device)
        on_card = torch.device(where).type == "cuda" and where == device
        pipe.dype_room = (
            memory.decoding_room(free, sizes, offload) if on_card else memory.free(where)
        )


@contextmanager
def set_aside(pipe, *names: str):
    """Parts with a place of their own, out of the pipeline's sight: it takes its device from its
    parts, and moves those that it sees."""
    parts = {name: getattr(pipe, name) for name in names}
    try:
        for name in names:
            setattr(pipe, name, None)
        yield
    finally:
        for name, part in parts.items():
            setattr(pipe, name, part)


def execution_device(pipe) -> torch.device:
    """Where the transformer computes, wherever the other parts are and rest in between."""
    with set_aside(pipe, *getattr(pipe, "dype_apart", {})):
        return pipe._execution_device


def text_device(pipe) -> torch.device:
    """Where the text encoders compute."""
    apart = getattr(pipe, "dype_apart", {})
    return torch.device(apart.get("text_encoder") or execution_device(pipe))


def set_tiling(pipe, mode: str, tile_size: int | None, pixels: int) -> bool:
    """Decode in tiles: always, never, or ("auto") where an untiled decode would not fit.

    pipe: as `place` left it. tile_size: px of a tile's side; None: the autoencoder's own. Returns
    whether.
    """
    vae, room = pipe.vae, pipe.dype_room
    needed = memory.decoding(vae, pixels, pipe.dype_apart.get("vae") or execution_device(pipe))
    tiled = needed > room if mode == "auto" else mode == "on"
    if tiled and mode == "auto" and not vae.use_tiling:
        print(f"tiled decoding: untiled it takes {memory.gib(needed)}, {memory.gib(room)} are free")
    if tiled and hasattr(vae, "tile_sample_min_height"):  # Qwen-Image's: 484 tiles by its own 256
        side = tile_size or QWEN_TILE
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    elif tiled:
        vae.enable_tiling()
        if tile_size:
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile_size, tile_size // 8
    else:
        vae.disable_tiling()
    return tiled
