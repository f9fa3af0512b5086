"""Learning-rate schedules: functions of the update number, made from the `scheduler` section."""

from jaxtrain.scheduler.factory import HFSchedulerFactory as HFSchedulerFactory
from jaxtrain.scheduler.factory import Schedule as Schedule
from jaxtrain.scheduler.factory import SchedulerFactory as SchedulerFactory
from jaxtrain.scheduler.factory import WSDSchedulerFactory as WSDSchedulerFactory
