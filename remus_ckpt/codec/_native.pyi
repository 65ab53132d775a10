from typing import Any

KERNELS: dict[str, dict[str, Any]]
FEATURES: dict[str, bool]
