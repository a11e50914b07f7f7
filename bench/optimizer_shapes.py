"""The parameters of real models, from a few numbers: the shape of every tensor, in order."""

Shapes = list[tuple[int, ...]]


def gpt2(layers: int, D: int, V: int = 50257, L: int = 1024) -> Shapes:
    """GPT-2's, which has biases, and whose output layer is its embedding."""
    norm = [(D,), (D,)]
    attention = [(D, 3 * D), (3 * D,), (D, D), (D,)]
    feed_forward = [(D, 4 * D), (4 * D,), (4 * D, D), (D,)]
    return [(V, D), (L, D), *layers * [*norm, *attention, *norm, *feed_forward], *norm]


def llama(layers: int, D: int, F: int, V: int, H: int, G: int) -> Shapes:
    """Llama's: gated, with grouped heads and without biases, and an output layer of its own."""
    K = D // H
    attention = [(H * K, D), (G * K, D), (G * K, D), (D, H * K)]
    feed_forward = [(F, D), (F, D), (D, F)]
    return [(V, D), *layers * [*attention, *feed_forward, (D,), (D,)], (D,), (V, D)]


MODELS: dict[str, Shapes] = {
    "GPT-2 124M": gpt2(layers=12, D=768),
    "GPT-2 350M": gpt2(layers=24, D=1024),
    "GPT-2 1.5B": gpt2(layers=48, D=1600),
    "Llama-3 8B": llama(layers=32, D=4096, F=14336, V=128256, H=32, G=8),
}
SMALLEST = gpt2(layers=2, D=64, V=512, L=64)
CPU_MODELS = 1  # how many of the models are measured on a CPU: the first ones
