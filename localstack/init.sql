create database if not exists projectionist character set utf8mb4;
create user if not exists 'root'@'%' identified by '';
grant all privileges on *.* to 'root'@'%' with grant option;
create user if not exists 'projectionist'@'%' identified by 'projectionist';
grant all privileges on *.* to 'projectionist'@'%' with grant option;
