"""Published methods, one file each (see `carpool policies`)."""

from carpool.policies.allow_list import AllowList
from carpool.policies.base import Inputs, Policy
from carpool.policies.base_energy import BASE
from carpool.policies.bit_plan import BitPlan
from carpool.policies.c2r import C2R
from carpool.policies.controls import RandomCoreset, TopK
from carpool.policies.depth import Depth
from carpool.policies.des import DESSeq, DESVote
from carpool.policies.hobbit import Hobbit
from carpool.policies.lynx import Lynx
from carpool.policies.odp import ODP
from carpool.policies.oea import OEA
from carpool.policies.registry import policies, policy_class, register
from carpool.policies.sere import SERE
from carpool.policies.skipping import LayerThreshold, TailMass, TopP
from carpool.policies.surrogate import Surrogate
from carpool.policies.xshare import XShare
from carpool.policies.xshare_parallel import XShareExpertParallel
from carpool.policies.xshare_speculative import XShareSpeculative

__all__ = [
    "BASE",
    "C2R",
    "ODP",
    "OEA",
    "SERE",
    "AllowList",
    "BitPlan",
    "DESSeq",
    "DESVote",
    "Depth",
    "Hobbit",
    "Inputs",
    "LayerThreshold",
    "Lynx",
    "Policy",
    "RandomCoreset",
    "Surrogate",
    "TailMass",
    "TopK",
    "TopP",
    "XShare",
    "XShareExpertParallel",
    "XShareSpeculative",
    "policies",
    "policy_class",
    "register",
]
