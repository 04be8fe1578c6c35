"""The ops: contract, checks, backends and autograd of each."""
