"""One job on many processes: those of a launcher (torchrun, accelerate), or the workers of a Ray cluster.

:func:`cropi.distributed.ranks.sketch` is the job of a launcher's processes, :func:`cropi.distributed.ray.sketch` that
of a Ray cluster. Both cut the job in numbered chunks (:mod:`cropi.sketching.chunks`), write a store a process, and move
the rows to one store at the end (:mod:`cropi.store.parts`).
"""
