# GPU Service as a scheduled task that starts with the machine, for Windows without WinSW. In an administrator's
# PowerShell: .\deploy\windows-task.ps1 -Caller 192.168.1.20
param(
    [string] $Folder = (Split-Path $PSScriptRoot),  # that has .venv and gpu_service.py
    [string] $Caller = "LocalSubnet"                # who may reach the port
)
$ErrorActionPreference = "Stop"

# Settings come from the machine's environment: [Environment]::SetEnvironmentVariable("API_KEY", "...", "Machine")
$action = New-ScheduledTaskAction -Execute "$Folder\.venv\Scripts\python.exe" -Argument "gpu_service.py" -WorkingDirectory $Folder
$trigger = New-ScheduledTaskTrigger -AtStartup
$settings = New-ScheduledTaskSettingsSet -ExecutionTimeLimit ([TimeSpan]::Zero) -RestartCount 255 `
    -RestartInterval (New-TimeSpan -Minutes 1) -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
$principal = New-ScheduledTaskPrincipal -UserId "NT AUTHORITY\LOCAL SERVICE" -LogonType ServiceAccount
Register-ScheduledTask -TaskName "GPU Service" -Action $action -Trigger $trigger -Settings $settings -Principal $principal -Force

New-NetFirewallRule -DisplayName "GPU Service" -Direction Inbound -Protocol TCP -LocalPort 8765 -RemoteAddress $Caller -Action Allow
Start-ScheduledTask -TaskName "GPU Service"
