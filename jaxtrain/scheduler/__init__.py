"""Learning-rate schedules: functions of the step number, built from the `scheduler` section."""

from jaxtrain.scheduler.factory import HFSchedulerFactory as HFSchedulerFactory
from jaxtrain.scheduler.factory import Schedule as Schedule
from jaxtrain.scheduler.factory import SchedulerFactory as SchedulerFactory
from jaxtrain.scheduler.factory import WSDSchedulerFactory as WSDSchedulerFactory
