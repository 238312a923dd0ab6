"""How are adapters shipped?"""

from minipeft.serve.checkpoint import load_adapter
from minipeft.serve.tenants import Bank

__all__ = ["Bank", "load_adapter"]
