"""How are adapters shipped?"""

from minipeft.serve.checkpoint import load_adapter

__all__ = ["load_adapter"]
