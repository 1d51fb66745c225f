"""What every machine of the cluster is doing beside a run: processors, memory, disk, network, GPUs."""

import ray
import ray.exceptions
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_WITHIN_S = 5.0


class Machine:
    """MLflow's meters of the machine that this process is on."""

    def __init__(self) -> None:
        self._meters = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._meters.append(GPUMonitor())
        except (ImportError, RuntimeError):  # there is none
            return

    def sample(self) -> dict[str, float]:
        """What is now; processors over the time since the last call."""
        values: dict[str, float] = {}
        for meter in self._meters:
            meter.collect_metrics()
            values |= meter.aggregate_metrics()
            meter.clear_metrics()
        return values


class Machines:
    """Those of the cluster that this process belongs to; they come and go."""

    def __init__(self) -> None:
        self._here, self._there = Machine(), {}
        # Not `get_node_ip_address`, which need not be the one that the node was started with.
        mine = ray.get_runtime_context().get_node_id()
        self._address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == mine)

    def sample(self) -> dict[str, float]:
        """system/<address of the machine>/<metric> -> value, of all that answer in time."""
        found = {self._address: self._here.sample()}
        asked = {actor.sample.remote(): address for address, actor in self._actors().items()}
        ready = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_WITHIN_S)[0] if asked else []
        for reference in ready:
            try:
                found[asked[reference]] = ray.get(reference)
            except ray.exceptions.RayError:  # the machine is lost; the next call starts anew
                del self._there[asked[reference]]
        return {
            f"system/{address}/{name}": value
            for address, values in found.items()
            for name, value in values.items()
        }

    def _actors(self) -> dict:
        """Address -> actor, one on each other machine, however many nodes of the cluster it is."""
        nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for address in nodes.keys() - self._there.keys() - {self._address}:
            place = NodeAffinitySchedulingStrategy(nodes[address], soft=False)
            self._there[address] = ray.remote(Machine).options(num_cpus=0, scheduling_strategy=place).remote()
        self._there = {address: actor for address, actor in self._there.items() if address in nodes}
        return self._there
