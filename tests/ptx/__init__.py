"""Executes the PTX that Triton and nvcc compile the GPU kernels to, on the CPU, without a GPU.

    make ptx ARCH="80 90"        # every case of cases.py on these architectures
    make ptx-mutants ARCH=80     # breaks one instruction at a time; what notices it
    python -m tests.ptx.run 90 "info_nce 150x64" --count

``program.py`` turns PTX into Python, ``machine.py`` runs it on NumPy arrays over the lanes of
several thread blocks (CTAs), and two drivers start it from the project's own launchers:
``triton_driver.py`` takes the place of Triton's driver and ``cuda_driver.py`` that of the CUDA
runtime.

**Modelled.** Integer, fp64, fp32, fp16, bf16 and packed arithmetic and conversions with PTX's
rounding and flushing; predicates and divergence; barriers with numbers and counts; warp
collectives; ldmatrix and mma.sync; cp.async, whose bytes arrive at wait_group only. sm_90: wgmma,
whose registers are NaN and whose operands are locked until wait_group; mbarriers; tensor copies by
descriptor, which arrive when their barrier is tested; fence.proxy.async. sm_100: tcgen05 and tensor
memory. sm_120: f32x2. Global memory is the memory of the process.

**Errors.** Accesses outside of all tensors or of shared memory; misaligned ones; shared bytes that
are uninitialised or that a copy has not delivered; races in shared memory, between warps without a
barrier and reads of what another lane of the warp wrote without a warp barrier; races in global
memory between CTAs; lanes of one warp that write different values to one address; barriers that
cannot complete; warp collectives that name a lane that is elsewhere; instructions that are not
modelled.

**Not modelled.** What the assembler (ptxas) makes of PTX: registers, spills, order, its own bugs.
Time and caches. The order in which CTAs see each other's writes within a launch. Clusters of
several CTAs, textures, local memory. Errors of approximate instructions (ex2, lg2, rcp, rsqrt,
div.full): they are rounded correctly here and are up to 2 units in the last place off on a GPU;
``--noise`` adds so much (to lg2 near 1 the 2^-22 that PTX allows). How tensor cores add is not
documented: by default exact sums are truncated to fp32 every 8 products of 16 bits (mma.sync) or 16
(wgmma) and every 4 of tf32 (8 in wgmma); ``--cut`` also truncates each product to 24 bits of the
largest one, ``--nearest`` rounds correctly. fma.rn.f32 rounds twice, once in fp64, which is wrong
in one of 2^29 cases. Not checked: that each reader of an asynchronous copy waits for its barrier
itself; wgmma.fence, tcgen05.wait and the fences of tcgen05; what a barrier of some warps of a CTA
leaves unordered among the others; reads of global memory that nothing wrote, except by the NaN that
they find there.
"""
