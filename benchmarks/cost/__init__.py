"""What sketching costs on a CPU: ``python -m benchmarks.cost`` (about 25 minutes on 2 cores).

On real prompt groups of the example data, alternating and taking medians:

1. forward + backward with frozen weights; the same with the sketch; forward + backward with weight gradients;
2. peak memory of each, in a process of its own;
3. the slab sketch without folding against torch.mm on the weight-gradient products that it replaces;
4. per prompt, against a backward with a flat gradient followed by a flat CountSketch (``index_add_``), and by the
   paper's 10 % dropout and dense Gaussian projection to 32768 (TRAK's BasicProjector, timed at a small k and scaled).
"""
