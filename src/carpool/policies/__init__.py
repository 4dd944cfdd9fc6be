"""Published methods, one file each (see `carpool policies`)."""

from carpool.policies.base import Inputs, Policy
from carpool.policies.controls import RandomCoreset, TopK
from carpool.policies.des import DESSeq, DESVote
from carpool.policies.oea import OEA
from carpool.policies.registry import policies, policy_class, register
from carpool.policies.sere import SERE
from carpool.policies.xshare import XShare

__all__ = [
    "OEA",
    "SERE",
    "DESSeq",
    "DESVote",
    "Inputs",
    "Policy",
    "RandomCoreset",
    "TopK",
    "XShare",
    "policies",
    "policy_class",
    "register",
]
